#include "lockstep/collective/wire_kernels.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "lockstep/base/instruction_sets.h"

// Loops are written as in update/kernels.cc: plain, and compiled once for each instruction set.

#if defined(__clang__)
#define LOCKSTEP_NO_ALIAS _Pragma("clang loop vectorize(assume_safety)")
#else
#define LOCKSTEP_NO_ALIAS _Pragma("GCC ivdep")
#endif
#define LOCKSTEP_INLINE inline __attribute__((always_inline))

namespace lockstep {
namespace {

constexpr std::uint32_t kInfinity = 0x7f800000;
constexpr float kLeastMagnitude = 0x1p-100f;  // a scale is never subnormal
constexpr float kMostMagnitude = 0x1p127f;    // and 127 of it are finite
constexpr float kMostSteps = 127;
constexpr float kRounds = 0x1.8p23f;  // added to a small number, its last place is 1

LOCKSTEP_INLINE void bf16_encode_loop(std::byte* wire, const float* values, float* error,
                                      std::size_t count) {
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < count; ++i) {
    const float value = values[i] + error[i];
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const std::uint32_t rounded = (bits & 0x7fffffff) > kInfinity ? 0x7fc0 : nearest;
    const auto half = static_cast<std::uint16_t>(rounded);
    std::memcpy(wire + 2 * i, &half, 2);
    const float lost = value - std::bit_cast<float>(rounded << 16);
    const bool finite = (std::bit_cast<std::uint32_t>(lost) & kInfinity) != kInfinity;
    error[i] = finite ? lost : 0;
  }
}

LOCKSTEP_INLINE void bf16_decode_loop(float* values, const std::byte* wire, std::size_t count) {
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t half;
    std::memcpy(&half, wire + 2 * i, 2);
    values[i] = std::bit_cast<float>(std::uint32_t{half} << 16);
  }
}

LOCKSTEP_INLINE void int8_encode_block(std::byte* wire, const float* values, float* error,
                                       std::size_t count) {
  std::int32_t largest = 0;  // signed: without its sign bit, a number's bits are positive
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < count; ++i) {
    const float value = values[i] + error[i];
    error[i] = value;
    const std::int32_t bits = std::bit_cast<std::int32_t>(value) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  auto* const steps = reinterpret_cast<std::int8_t*>(wire + sizeof(float));
  const float magnitude = std::bit_cast<float>(largest);
  const bool finite = magnitude < kMostMagnitude;
  const float scale = !finite                       ? std::numeric_limits<float>::quiet_NaN()
                      : magnitude < kLeastMagnitude ? 0
                                                    : magnitude / kMostSteps;
  std::memcpy(wire, &scale, sizeof scale);
  if (!finite) {
    std::memset(steps, 1, count);
    std::fill_n(error, count, 0.0f);
    return;
  }
  const float inverse = scale == 0 ? 0 : kMostSteps / magnitude;
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < count; ++i) {
    const float value = error[i];
    const std::int32_t step = std::bit_cast<std::int32_t>(value * inverse + kRounds) -
                              std::bit_cast<std::int32_t>(kRounds);
    steps[i] = static_cast<std::int8_t>(step);
    error[i] = value - static_cast<float>(step) * scale;
  }
}

LOCKSTEP_INLINE void int8_encode_loop(std::byte* wire, const float* values, float* error,
                                      std::size_t count) {
  for (; count > kWireBlock; count -= kWireBlock) {
    int8_encode_block(wire, values, error, kWireBlock);
    wire += sizeof(float) + kWireBlock, values += kWireBlock, error += kWireBlock;
  }
  if (count > 0) int8_encode_block(wire, values, error, count);
}

LOCKSTEP_INLINE void int8_decode_loop(float* values, const std::byte* wire, std::size_t count) {
  while (count > 0) {
    float scale;
    std::memcpy(&scale, wire, sizeof scale);
    const auto* const steps = reinterpret_cast<const std::int8_t*>(wire + sizeof scale);
    const std::size_t block = std::min(kWireBlock, count);
    LOCKSTEP_NO_ALIAS
    for (std::size_t i = 0; i < block; ++i) values[i] = static_cast<float>(steps[i]) * scale;
    wire += sizeof scale + block, values += block, count -= block;
  }
}

#define LOCKSTEP_VARIANT(SET, TARGET)                                              \
  namespace SET {                                                                  \
  TARGET void encode_bf16(std::byte* w, const float* v, float* e, std::size_t n) { \
    bf16_encode_loop(w, v, e, n);                                                  \
  }                                                                                \
  TARGET void decode_bf16(float* v, const std::byte* w, std::size_t n) {           \
    bf16_decode_loop(v, w, n);                                                     \
  }                                                                                \
  TARGET void encode_int8(std::byte* w, const float* v, float* e, std::size_t n) { \
    int8_encode_loop(w, v, e, n);                                                  \
  }                                                                                \
  TARGET void decode_int8(float* v, const std::byte* w, std::size_t n) {           \
    int8_decode_loop(v, w, n);                                                     \
  }                                                                                \
  }
#define LOCKSTEP_ENTRY(SET, USABLE) \
  { #SET, USABLE, SET::encode_bf16, SET::decode_bf16, SET::encode_int8, SET::decode_int8 }

LOCKSTEP_VARIANT(baseline, )
#if defined(__x86_64__)
LOCKSTEP_VARIANT(avx2, __attribute__((target("avx2"))))
LOCKSTEP_VARIANT(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw"))))
#endif

}  // namespace

std::string_view name_of(WireFormat format) {
  constexpr std::string_view kNames[] = {"fp32", "bf16", "int8"};
  return kNames[static_cast<std::size_t>(format)];
}

std::size_t wire_bytes(WireFormat format, std::size_t count) {
  if (format == WireFormat::bf16) return 2 * count;
  if (format == WireFormat::fp32) return 4 * count;
  return count + (count + kWireBlock - 1) / kWireBlock * sizeof(float);
}

std::span<const WireKernels> all_wire_kernels() {
  static const WireKernels sets[] = {
    LOCKSTEP_ENTRY(baseline, true),
#if defined(__x86_64__)
    LOCKSTEP_ENTRY(avx2, has_avx2()),
    LOCKSTEP_ENTRY(avx512, has_avx512()),
#endif
  };
  return sets;
}

const WireKernels& wire_kernels() {
  static const WireKernels& best = widest(all_wire_kernels());
  return best;
}

}  // namespace lockstep
