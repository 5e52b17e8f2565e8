#include "lockstep/update/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "lockstep/base/error.h"
#include "lockstep/update/kernels.h"

namespace lockstep {

Optimizer::Optimizer(const OptimizerOptions& options, std::size_t count)
    : options_(options), count_(count) {
  const bool adaptive = options.kind != OptimizerKind::sgd;
  if (adaptive || options.momentum != 0) first_.resize(count);
  if (adaptive) second_.resize(count);
}

void Optimizer::step(std::span<float> weights, std::span<const float> gradient,
                     float gradient_scale, double lr) {
  LOCKSTEP_CHECK(weights.size() == count_ && gradient.size() == count_,
                 "an optimizer steps spans of the size it was made for");
  ++steps_;
  StepNumbers numbers{.gradient_scale = gradient_scale, .lr = static_cast<float>(lr)};
  if (options_.kind == OptimizerKind::adamw)
    numbers.shrink = static_cast<float>(1 - lr * options_.weight_decay);
  else
    numbers.weight_decay = static_cast<float>(options_.weight_decay);
  const StepArrays arrays{weights.data(), gradient.data(), first_.data(), second_.data(), count_};
  const UpdateKernels& kernels = update_kernels();

  if (options_.kind == OptimizerKind::sgd) {
    numbers.momentum = static_cast<float>(options_.momentum);
    const auto kernel = options_.momentum == 0 ? kernels.sgd
                        : options_.nesterov    ? kernels.sgd_nesterov
                                               : kernels.sgd_momentum;
    return kernel(numbers, arrays);
  }
  const double exponent = static_cast<double>(steps_);
  const double correction1 = 1 - std::pow(options_.beta1, exponent);
  const double correction2 = 1 - std::pow(options_.beta2, exponent);
  numbers.beta1 = static_cast<float>(options_.beta1);
  numbers.one_minus_beta1 = static_cast<float>(1 - options_.beta1);
  numbers.beta2 = static_cast<float>(options_.beta2);
  numbers.one_minus_beta2 = static_cast<float>(1 - options_.beta2);
  numbers.root_correction2 = static_cast<float>(std::sqrt(correction2));
  numbers.eps = static_cast<float>(options_.eps);
  numbers.step_size = static_cast<float>(lr / correction1);
  kernels.adam(numbers, arrays);
}

double sum_of_squares(std::span<const float> values) {
  constexpr std::size_t kTile = 1024;
  constexpr std::size_t kLanes = 16;  // fixed, so that the bits don't depend on the machine
  double total = 0;
  while (!values.empty()) {
    const std::span<const float> tile = values.first(std::min(kTile, values.size()));
    double lanes[kLanes] = {};
    std::size_t i = 0;
    for (; i + kLanes <= tile.size(); i += kLanes)
      for (std::size_t lane = 0; lane < kLanes; ++lane)
        lanes[lane] += static_cast<double>(tile[i + lane]) * static_cast<double>(tile[i + lane]);
    for (; i < tile.size(); ++i)
      lanes[i % kLanes] += static_cast<double>(tile[i]) * static_cast<double>(tile[i]);
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    total += sum;
    values = values.subspan(tile.size());
  }
  return total;
}

double learning_rate(const Schedule& schedule, std::int64_t step) {
  const bool warms_up =
      schedule.kind == Schedule::Kind::linear || schedule.kind == Schedule::Kind::cosine;
  if (warms_up && step < schedule.warmup_steps)
    return schedule.lr * static_cast<double>(step + 1) / static_cast<double>(schedule.warmup_steps);
  switch (schedule.kind) {
    case Schedule::Kind::constant:
    case Schedule::Kind::linear:
      return schedule.lr;
    case Schedule::Kind::cosine: {
      const std::int64_t course =
          std::max<std::int64_t>(schedule.total_steps - schedule.warmup_steps, 1);
      const std::int64_t done = std::min(step - schedule.warmup_steps, course);
      const double angle =
          std::numbers::pi * static_cast<double>(done) / static_cast<double>(course);
      return schedule.min_lr + (schedule.lr - schedule.min_lr) * (1 + std::cos(angle)) / 2;
    }
    case Schedule::Kind::step:
      return schedule.lr * std::pow(schedule.gamma, static_cast<double>(step / schedule.step_size));
  }
  LOCKSTEP_CHECK(false, "unknown schedule");
}

}  // namespace lockstep
