// The kernels' bodies, compiled once for each instruction set: kernels.cc includes this file inside a
// namespace and a target of its own, which is why it has no include guard and includes nothing. No
// function here may have external linkage, or the linker would mix the instruction sets.

// The 16-bit formats as storage. Conversions have no branches, so that loops vectorise, and never
// form a subnormal float, so that a thread that flushes those to zero gets the same bits.
struct Float16 {
  std::uint16_t bits;
  static float widen(Float16 half) {
    const std::uint32_t magnitude = half.bits & 0x7fffu;
    const std::uint32_t sign = static_cast<std::uint32_t>(half.bits & 0x8000u) << 16;
    const std::uint32_t normal = (magnitude << 13) + (112u << 23);
    const std::uint32_t special = (magnitude << 13) | 0x7f800000u;
    const std::uint32_t subnormal =
        std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f);
    const std::uint32_t value =
        magnitude >= 0x7c00u ? special : (magnitude < 0x0400u ? subnormal : normal);
    return std::bit_cast<float>(value | sign);
  }
  static Float16 round(float wide) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(wide);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t normal =
        (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // 0.5's last place is float16's smallest subnormal: the addition rounds for us.
    const std::uint32_t subnormal =
        std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    std::uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
    value = magnitude >= 0x477ff000u ? 0x7c00u : value;  // 65520 and above round to infinity
    value = magnitude > 0x7f800000u ? nan : value;
    return {static_cast<std::uint16_t>(value | sign)};
  }
};

struct Bfloat16 {
  std::uint16_t bits;
  static float widen(Bfloat16 half) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(half.bits) << 16);
  }
  static Bfloat16 round(float wide) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(wide);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40u;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>(is_nan ? nan : rounded)};
  }
};

template <typename T>
constexpr bool is_half = std::is_same_v<T, Float16> || std::is_same_v<T, Bfloat16>;

// load and store: from storage to the type that is computed in, and back. Integers are computed
// unsigned where they may overflow, which is defined and wraps.
template <typename T>
auto load(T value) {
  if constexpr (is_half<T>)
    return T::widen(value);
  else
    return value;
}
template <typename T, typename Computed>
T store(Computed value) {
  if constexpr (is_half<T>)
    return T::round(value);
  else
    return static_cast<T>(value);
}

struct Sum {
  template <typename T>
  static auto apply(T a, T b) {
    if constexpr (std::is_integral_v<T>)
      return static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b);
    else
      return a + b;
  }
};
struct Product {
  template <typename T>
  static auto apply(T a, T b) {
    if constexpr (std::is_integral_v<T>)
      return static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b);
    else
      return a * b;
  }
};
struct Min {
  template <typename T>
  static T apply(T a, T b) {
    return a < b || a != a ? a : b;
  }
};
struct Max {
  template <typename T>
  static T apply(T a, T b) {
    return a > b || a != a ? a : b;
  }
};

template <typename T, typename Operation>
void binary(void* out, const void* a, const void* b, std::size_t count) {
  T* to = static_cast<T*>(out);
  const T* x = static_cast<const T*>(a);
  const T* y = static_cast<const T*>(b);
  for (std::size_t i = 0; i < count; ++i)
    to[i] = store<T>(Operation::apply(load(x[i]), load(y[i])));
}

template <typename T>
BinaryKernel binary_of(Reduction reduction) {
  switch (reduction) {
    case Reduction::sum:
    case Reduction::mean:
      return binary<T, Sum>;
    case Reduction::min:
      return binary<T, Min>;
    case Reduction::max:
      return binary<T, Max>;
    case Reduction::product:
      return binary<T, Product>;
  }
  LOCKSTEP_CHECK(false, "not a reduction");
}

// Calls function(T{}) with the dtype's storage type.
template <typename Function>
auto with_type(Dtype dtype, Function&& function) {
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
  LOCKSTEP_CHECK(false, "not a dtype");
}

void divide(void* data, Dtype dtype, std::int64_t divisor, std::size_t count) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using Computed = std::conditional_t<std::is_integral_v<T>, std::int64_t, decltype(load(zero))>;
    T* values = static_cast<T*>(data);
    const auto by = static_cast<Computed>(divisor);
    for (std::size_t i = 0; i < count; ++i)
      values[i] = store<T>(static_cast<Computed>(load(values[i])) / by);
  });
}

void widen_to_float32(float* out, const void* in, Dtype dtype, std::size_t count) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    LOCKSTEP_CHECK(is_half<T>);
    if constexpr (is_half<T>)
      for (std::size_t i = 0; i < count; ++i) out[i] = T::widen(static_cast<const T*>(in)[i]);
  });
}

void round_from_float32(void* out, const float* in, Dtype dtype, std::size_t count) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    LOCKSTEP_CHECK(is_half<T>);
    if constexpr (is_half<T>)
      for (std::size_t i = 0; i < count; ++i) static_cast<T*>(out)[i] = T::round(in[i]);
  });
}

BinaryKernel binary_kernel(Dtype dtype, Reduction reduction) {
  return with_type(dtype, [&](auto zero) { return binary_of<decltype(zero)>(reduction); });
}
