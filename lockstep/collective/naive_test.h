// For tests alone: arithmetic of every dtype and the canonical tree written as plainly as possible,
// to hold the real ones to. Shares no code with kernels.cc and reduce.cc.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "lockstep/base/hash.h"
#include "lockstep/collective/group.h"

namespace lockstep::naive {

// A 16-bit floating-point format by its definition: sign, exponent, mantissa.
template <int kExponentBits, int kMantissaBits>
struct Half {
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  std::uint16_t bits = 0;

  float value() const {
    const double sign = bits >> 15 ? -1 : 1;
    const int exponent = (bits >> kMantissaBits) & ((1 << kExponentBits) - 1);
    const int mantissa = bits & ((1 << kMantissaBits) - 1);
    if (exponent == (1 << kExponentBits) - 1)
      return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN()
                           : static_cast<float>(sign) * std::numeric_limits<float>::infinity();
    if (exponent == 0)
      return static_cast<float>(sign * std::ldexp(mantissa, 1 - kBias - kMantissaBits));
    return static_cast<float>(
        sign * std::ldexp(mantissa + (1 << kMantissaBits), exponent - kBias - kMantissaBits));
  }
  // Rounds to nearest, ties to even. Not for NaN.
  static Half of(double value) {
    const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
    const auto infinity =
        static_cast<std::uint16_t>(((1 << kExponentBits) - 1) << kMantissaBits | sign);
    value = std::fabs(value);
    if (std::isinf(value)) return {infinity};
    if (value == 0) return {sign};
    const int exponent = std::max(std::ilogb(value), 1 - kBias);
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, kMantissaBits - exponent)),
                                      exponent - kMantissaBits);
    if (rounded >= std::ldexp(1.0, kBias + 1)) return {infinity};
    // The formats are ordered like their bits: count the steps from zero.
    const int top = rounded == 0 ? 1 - kBias : std::max(std::ilogb(rounded), 1 - kBias);
    const auto steps = static_cast<int>(std::ldexp(rounded, kMantissaBits - top)) +
                       ((top - (1 - kBias)) << kMantissaBits);
    return {static_cast<std::uint16_t>(steps | sign)};
  }
};
using Float16 = Half<5, 10>;
using Bfloat16 = Half<8, 7>;

template <typename T>
constexpr bool is_half = std::is_same_v<T, Float16> || std::is_same_v<T, Bfloat16>;

template <typename Function>
void with_type(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::float64:
      return function(double{});
    case Dtype::float32:
      return function(float{});
    case Dtype::float16:
      return function(Float16{});
    case Dtype::bfloat16:
      return function(Bfloat16{});
    case Dtype::int8:
      return function(std::int8_t{});
    case Dtype::int32:
      return function(std::int32_t{});
    case Dtype::int64:
      return function(std::int64_t{});
    case Dtype::uint8:
      return function(std::uint8_t{});
  }
}

// What a T is computed in: itself, float for 16-bit formats, 128 bits for integers.
template <typename T>
auto widen(T value) {
  if constexpr (is_half<T>)
    return value.value();
  else if constexpr (std::is_integral_v<T>)
    return static_cast<__int128>(value);
  else
    return value;
}
template <typename T, typename Wide>
T narrow(Wide value) {
  if constexpr (is_half<T>)
    return T::of(value);
  else
    return static_cast<T>(value);  // integers: the low bits
}

template <typename Wide>
Wide apply(Reduction reduction, Wide a, Wide b) {
  switch (reduction) {
    case Reduction::sum:
    case Reduction::mean:
      return a + b;
    case Reduction::min:
      return b < a ? b : a;
    case Reduction::max:
      return b > a ? b : a;
    case Reduction::product:
      return a * b;
  }
  return a;
}

// tree(lo, hi) over values, by the definition. between(x) is applied after every addition.
template <typename Wide, typename Between>
Wide tree(const std::vector<Wide>& values, int lo, int hi, Reduction reduction, Between&& between) {
  if (hi - lo == 1) return values[lo];
  int half = 1;
  while (half * 2 < hi - lo) half *= 2;
  return between(apply(reduction, tree(values, lo, lo + half, reduction, between),
                       tree(values, lo + half, hi, reduction, between)));
}

// Element `index` of the input of `owner` (a rank or a virtual rank): any bits for integers; for
// floating point non-zero numbers of very different magnitude, so that the order of additions
// shows.
template <typename T>
T input(std::uint64_t owner, std::uint64_t index) {
  const std::uint64_t random = mix({owner, index, 77});
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(random);
  } else {
    const double magnitude = 1.0 + static_cast<double>(random % 1021) / 1021;
    const int exponent = static_cast<int>((random >> 20) % 12) - 6;
    return narrow<T>(static_cast<float>((random >> 40) % 2 ? -1 : 1) *
                     static_cast<float>(std::ldexp(magnitude, exponent)));
  }
}

template <typename T>
std::vector<std::byte> inputs(std::uint64_t owner, std::size_t count) {
  std::vector<std::byte> bytes(count * sizeof(T));
  for (std::size_t i = 0; i < count; ++i) {
    const T value = input<T>(owner, i);
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  }
  return bytes;
}

// What all_reduce gives `owners` ranks: 16-bit types rounded once, or after every addition.
template <typename T>
std::vector<std::byte> reduced(int owners, std::size_t count, Reduction reduction,
                               bool round_once = true) {
  using Wide = decltype(widen(T{}));
  std::vector<std::byte> bytes(count * sizeof(T));
  std::vector<Wide> values(owners);
  for (std::size_t i = 0; i < count; ++i) {
    for (int owner = 0; owner < owners; ++owner) values[owner] = widen(input<T>(owner, i));
    Wide value = tree(values, 0, owners, reduction, [&](Wide wide) {
      // Integers wrap at every step, so that a mean divides what is left.
      return round_once && !std::is_integral_v<T> ? wide : widen(narrow<T>(wide));
    });
    if (reduction == Reduction::mean) value /= static_cast<Wide>(owners);
    const T result = narrow<T>(value);
    std::memcpy(bytes.data() + i * sizeof(T), &result, sizeof(T));
  }
  return bytes;
}

}  // namespace lockstep::naive
