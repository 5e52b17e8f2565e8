#include "lockstep/parallel/clip_grad_norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr std::size_t kTile = 1024;
constexpr std::size_t kLanes = 16;  // partial sums that a compiler may keep in vector registers

// A tile's sum of what `term` makes of each element.
template <typename T, typename Term>
double tile_sum(std::span<const T> tile, Term term) {
  std::array<double, kLanes> lanes{};
  std::size_t i = 0;
  for (; i + kLanes <= tile.size(); i += kLanes)
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(tile[i + lane]);
  for (; i < tile.size(); ++i) lanes[i % kLanes] += term(tile[i]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <typename T, typename Term>
double sum_of(std::span<const T> values, Term term) {
  double sum = 0;
  for (std::size_t begin = 0; begin < values.size(); begin += kTile)
    sum += tile_sum(values.subspan(begin, std::min(kTile, values.size() - begin)), term);
  return sum;
}

// The sum of |x|^p, or for infinity the largest |x|; not a number where one of them is none.
template <typename T>
double power_sum(std::span<const T> values, double p) {
  if (p == 2)
    return sum_of(values, [](T x) { return static_cast<double>(x) * static_cast<double>(x); });
  if (p == 1) return sum_of(values, [](T x) { return std::abs(static_cast<double>(x)); });
  if (std::isfinite(p))
    return sum_of(values, [p](T x) { return std::pow(std::abs(static_cast<double>(x)), p); });
  double largest = 0;
  for (const T x : values) {
    const double magnitude = std::abs(static_cast<double>(x));
    if (!(magnitude <= largest)) largest = std::isnan(largest) ? largest : magnitude;
  }
  return largest;
}

double power_sum(const at::Tensor& gradient, double p) {
  const at::Tensor strided =
      (gradient.layout() == at::kStrided ? gradient : gradient.to_dense()).contiguous();
  const auto count = static_cast<std::size_t>(strided.numel());
  if (strided.scalar_type() == at::kDouble)
    return power_sum(std::span(strided.const_data_ptr<double>(), count), p);
  const at::Tensor single = strided.to(at::kFloat);
  return power_sum(std::span(single.const_data_ptr<float>(), count), p);
}

}  // namespace

double clip_grad_norm_(const std::vector<at::Tensor>& parameters, double max_norm, double norm_type,
                       bool error_if_nonfinite) {
  if (!(norm_type > 0) || !(max_norm >= 0))
    throw ConfigError(
        fmt::format("clip_grad_norm_: max_norm {} or norm_type {} is out of range", max_norm,
                    norm_type),
        "a norm_type is above 0, such as 1, 2 or infinity; a max_norm is not negative");
  const at::NoGradGuard no_grad;
  const bool largest = std::isinf(norm_type);
  double total = 0;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& gradient = parameters[i].grad();
    if (!gradient.defined()) continue;
    const double one = power_sum(gradient, norm_type);
    if (error_if_nonfinite && !std::isfinite(one))
      throw Error(
          fmt::format("clip_grad_norm_: the gradient of parameter {} of {}, [{}], is not "
                      "finite",
                      i + 1, parameters.size(), fmt::join(gradient.sizes(), ", ")));
    if (!largest)
      total += one;
    else if (!std::isnan(total) && !(one <= total))
      total = one;
  }
  const double norm = largest          ? total
                      : norm_type == 2 ? std::sqrt(total)
                                       : std::pow(total, 1 / norm_type);
  const double scale = max_norm / (norm + 1e-6);
  if (!(scale >= 1))  // also what is not a number: it shows in every gradient, as in torch
    for (const at::Tensor& parameter : parameters)
      if (parameter.grad().defined()) parameter.mutable_grad().mul_(scale);
  return norm;
}

}  // namespace lockstep
