#include "lockstep/collective/kernels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "lockstep/collective/naive_test.h"

namespace lockstep {
namespace {

constexpr Reduction kReductions[] = {Reduction::sum, Reduction::mean, Reduction::min,
                                     Reduction::max, Reduction::product};

template <typename T>
void check_binary(const Kernels& set, Dtype dtype, Reduction reduction) {
  for (const std::size_t count : {0, 1, 7, 64, 1037}) {
    const auto a = naive::inputs<T>(1, count);
    const auto b = naive::inputs<T>(2, count);
    std::vector<std::byte> expected(a.size());
    for (std::size_t i = 0; i < count; ++i) {
      const T value = naive::narrow<T>(naive::apply(reduction, naive::widen(naive::input<T>(1, i)),
                                                    naive::widen(naive::input<T>(2, i))));
      std::memcpy(expected.data() + i * sizeof(T), &value, sizeof(T));
    }
    std::vector<std::byte> out(a.size());
    set.binary(dtype, reduction)(out.data(), a.data(), b.data(), count);
    EXPECT_EQ(out, expected);
    out = a;  // in place
    set.binary(dtype, reduction)(out.data(), out.data(), b.data(), count);
    EXPECT_EQ(out, expected);
    out = b;
    set.binary(dtype, reduction)(out.data(), a.data(), out.data(), count);
    EXPECT_EQ(out, expected);
  }
}

TEST(KernelsTest, EveryReductionOfEveryDtypeEqualsItsNaiveTwin) {
  for (const Kernels& set : all_kernels()) {
    if (!set.usable) continue;
    for (int i = 0; i < kDtypeCount; ++i) {
      const auto dtype = static_cast<Dtype>(i);
      for (const Reduction reduction : kReductions) {
        SCOPED_TRACE(std::string(set.name) + " " + std::string(name_of(dtype)) + " " +
                     std::string(name_of(reduction)));
        naive::with_type(dtype,
                         [&](auto zero) { check_binary<decltype(zero)>(set, dtype, reduction); });
      }
    }
  }
}

template <typename Half>
void check_conversions(const Kernels& set, Dtype dtype) {
  for (int i = 0; i < 1 << 16; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    float wide = 0;
    set.widen_to_float32(&wide, &bits, dtype, 1);
    const float expected = Half{bits}.value();
    std::uint16_t back = 0;
    set.round_from_float32(&back, &wide, dtype, 1);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(wide)) << i;
      float again = 0;
      set.widen_to_float32(&again, &back, dtype, 1);
      ASSERT_TRUE(std::isnan(again)) << i;
      continue;
    }
    ASSERT_EQ(std::memcmp(&wide, &expected, 4), 0) << i;
    ASSERT_EQ(back, bits);
    // Around and between the representable numbers, where rounding is decided.
    const float next = Half{static_cast<std::uint16_t>(bits + 1)}.value();
    const float middle = std::isinf(next) || std::isnan(next)
                             ? std::nextafterf(wide, INFINITY)
                             : static_cast<float>((double{wide} + double{next}) / 2);
    for (const float value : {middle, std::nextafterf(middle, -INFINITY),
                              std::nextafterf(middle, INFINITY), wide * 1.0001f}) {
      set.round_from_float32(&back, &value, dtype, 1);
      ASSERT_EQ(back, Half::of(value).bits) << value;
    }
  }
}

TEST(KernelsTest, ConversionsOfAll16BitNumbers) {
  for (const Kernels& set : all_kernels()) {
    if (!set.usable) continue;
    check_conversions<naive::Float16>(set, Dtype::float16);
    check_conversions<naive::Bfloat16>(set, Dtype::bfloat16);
  }
}

TEST(KernelsTest, MinAndMaxGiveNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Reduction reduction : {Reduction::min, Reduction::max}) {
    const float a[] = {nan, 1.0f, 1.0f}, b[] = {1.0f, nan, 2.0f};
    float out[3];
    kernels().binary(Dtype::float32, reduction)(out, a, b, 3);
    EXPECT_TRUE(std::isnan(out[0]));
    EXPECT_TRUE(std::isnan(out[1]));
    EXPECT_EQ(out[2], reduction == Reduction::min ? 1.0f : 2.0f);
  }
}

TEST(KernelsTest, IntegersDivideTowardZero) {
  std::int32_t values[] = {7, -7, 6, -1};
  kernels().divide(values, Dtype::int32, 2, 4);
  EXPECT_EQ(values[0], 3);
  EXPECT_EQ(values[1], -3);
  EXPECT_EQ(values[2], 3);
  EXPECT_EQ(values[3], 0);
  double real = 7;
  kernels().divide(&real, Dtype::float64, 2, 1);
  EXPECT_EQ(real, 3.5);
}

}  // namespace
}  // namespace lockstep
