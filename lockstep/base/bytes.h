// Reading numbers out of untrusted bytes: every read is checked before it happens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>

namespace lockstep {

// True if [offset, offset + length) lies inside a buffer of `size` bytes; cannot overflow.
constexpr bool in_bounds(std::uint64_t offset, std::uint64_t length, std::uint64_t size) {
  return offset <= size && length <= size - offset;
}

// a * b, or nothing if it does not fit.
constexpr std::optional<std::uint64_t> checked_multiply(std::uint64_t a, std::uint64_t b) {
  std::uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

// A little- or big-endian unsigned integer at `offset`, or nothing if it lies outside.
template <typename T>
std::optional<T> read_little_endian(std::span<const std::byte> bytes, std::size_t offset) {
  static_assert(std::is_unsigned_v<T>);
  if (!in_bounds(offset, sizeof(T), bytes.size())) return std::nullopt;
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i)
    value |=
        static_cast<T>(static_cast<T>(std::to_integer<std::uint8_t>(bytes[offset + i])) << (8 * i));
  return value;
}
template <typename T>
std::optional<T> read_big_endian(std::span<const std::byte> bytes, std::size_t offset) {
  static_assert(std::is_unsigned_v<T>);
  if (!in_bounds(offset, sizeof(T), bytes.size())) return std::nullopt;
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i)
    value = static_cast<T>((value << 8) | std::to_integer<std::uint8_t>(bytes[offset + i]));
  return value;
}
template <typename T>
void write_little_endian(T value, std::byte* out) {
  static_assert(std::is_unsigned_v<T>);
  for (std::size_t i = 0; i < sizeof(T); ++i) out[i] = static_cast<std::byte>(value >> (8 * i));
}

}  // namespace lockstep
