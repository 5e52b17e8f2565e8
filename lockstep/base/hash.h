// Digests for files and weights, bytes as text, checksums for TensorBoard records, and a mixing
// function for seeds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

namespace lockstep {

// SHA-256 in hexadecimal (OpenSSL).
std::string sha256_hex(std::span<const std::byte> bytes);
std::string sha256_hex_of_file(const std::string& path);

// Base64 (OpenSSL). from_base64 throws Error for text that is none.
std::string to_base64(std::string_view bytes);
std::string from_base64(std::string_view text);

// CRC-32C (Castagnoli), as TFRecord files use it (unmasked).
std::uint32_t crc32c(std::span<const std::byte> bytes);

// Mixes words into one well distributed 64-bit value (SplitMix64's finaliser, word by word). The
// order of the words counts. Fixed for ever: seeds derive from it, so results depend on it.
constexpr std::uint64_t mix(std::initializer_list<std::uint64_t> words) {
  std::uint64_t state = 0x9e3779b97f4a7c15;
  for (std::uint64_t word : words) {
    state += word + 0x9e3779b97f4a7c15;
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9;
    state = (state ^ (state >> 27)) * 0x94d049bb133111eb;
    state ^= state >> 31;
  }
  return state;
}

}  // namespace lockstep
