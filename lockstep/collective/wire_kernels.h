// Float32 numbers in the form in which a slow link carries them, with error feedback (Seide et al.,
// "1-bit stochastic gradient descent", 2014): what the wire loses is kept and added to the next
// values. Torch-free, stateless; any thread. All instruction sets give the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace lockstep {

enum class WireFormat : std::uint8_t {
  fp32,  // as they are
  bf16,  // rounded to the nearest
  int8,  // in blocks of kWireBlock: a float32 scale, then a byte for each
};
std::string_view name_of(WireFormat format);

inline constexpr std::size_t kWireBlock = 256;
// Of so many values, which begin a block.
std::size_t wire_bytes(WireFormat format, std::size_t count);

// wire = values + error; error = what is lost of that. What is infinite or no number arrives so
// (int8: its block as no numbers) and leaves no error. An int8 block whose largest magnitude is
// below 2^-100 travels as zeros, one whose largest is from 2^127 on as no numbers.
struct WireKernels {
  using Encode = void (*)(std::byte* wire, const float* values, float* error, std::size_t count);
  using Decode = void (*)(float* values, const std::byte* wire, std::size_t count);
  std::string_view name;
  bool usable;  // on this machine
  Encode encode_bf16;
  Decode decode_bf16;
  Encode encode_int8;
  Decode decode_int8;

  // Not of fp32.
  void encode(WireFormat format, std::byte* wire, const float* values, float* error,
              std::size_t count) const {
    (format == WireFormat::bf16 ? encode_bf16 : encode_int8)(wire, values, error, count);
  }
  void decode(WireFormat format, float* values, const std::byte* wire, std::size_t count) const {
    (format == WireFormat::bf16 ? decode_bf16 : decode_int8)(values, wire, count);
  }
};
std::span<const WireKernels> all_wire_kernels();
const WireKernels& wire_kernels();  // the widest that this machine has

}  // namespace lockstep
