#include <fmt/format.h>

#include <cmath>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/data/dataset.h"

namespace lockstep {
namespace {

// The C library's log may differ from machine to machine in the last bit. This one uses nothing but
// IEEE's exact operations: log(2^e * m) = e log 2 + 2 artanh((m - 1) / (m + 1)).
double portable_log(double value) {
  int exponent = 0;
  double mantissa = std::frexp(value, &exponent);  // [0.5, 1)
  if (mantissa < 0.70710678118654752) mantissa *= 2, --exponent;
  const double s = (mantissa - 1) / (mantissa + 1);  // |s| < 0.172
  double series = 0;
  for (int k = 23; k >= 1; k -= 2) series = series * s * s + 1.0 / k;
  return exponent * 0.69314718055994531 + 2 * s * series;
}

// The standard normal value number `index` of a stream: Marsaglia's polar method on counters.
double normal(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
  const auto uniform = [&](std::uint64_t draw) {  // (-1, 1)
    return std::ldexp(static_cast<double>(mix({seed, stream, index, draw}) >> 11), -52) - 1;
  };
  for (std::uint64_t draw = 0;; draw += 2) {
    const double x = uniform(draw);
    const double y = uniform(draw + 1);
    const double square = x * x + y * y;
    if (square > 0 && square < 1) return x * std::sqrt(-2 * portable_log(square) / square);
  }
}

}  // namespace

LinearRegressionData make_linear_regression(std::uint64_t rows, std::int64_t features, double noise,
                                            std::uint64_t seed) {
  LOCKSTEP_CHECK(rows > 0 && features > 0);
  enum Stream : std::uint64_t { kWeights, kBias, kRows, kNoise };
  const auto width = static_cast<std::uint64_t>(features);
  LinearRegressionData result;
  for (std::uint64_t j = 0; j < width; ++j)
    result.weights.push_back(static_cast<float>(normal(seed, kWeights, j)));
  result.bias = static_cast<float>(normal(seed, kBias, 0));

  Dataset& data = result.data;
  data.source = "linear-regression";
  data.sample_shape = {features};
  for (std::int64_t i = 1; i <= features; ++i) data.feature_names.push_back(fmt::format("x{}", i));
  data.rows = rows;
  data.values.reserve(rows * width);
  data.targets.reserve(rows);
  for (std::uint64_t i = 0; i < rows; ++i) {
    double target = result.bias + noise * normal(seed, kNoise, i);
    for (std::uint64_t j = 0; j < width; ++j) {
      const auto value = static_cast<float>(normal(seed, kRows, i * width + j));
      data.values.push_back(value);
      target += static_cast<double>(value) * result.weights[j];
    }
    data.targets.push_back(static_cast<float>(target));
  }
  return result;
}

}  // namespace lockstep
