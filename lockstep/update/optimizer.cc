#include "lockstep/update/optimizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>

#include "lockstep/base/error.h"

namespace lockstep {

SGD::operator OptimizerOptions() const {
  return {.kind = OptimizerKind::sgd,
          .lr = lr,
          .momentum = momentum,
          .dampening = dampening,
          .nesterov = nesterov,
          .weight_decay = weight_decay};
}

template <bool decoupled>
AdamWith<decoupled>::operator OptimizerOptions() const {
  return {.kind = decoupled ? OptimizerKind::adamw : OptimizerKind::adam,
          .lr = lr,
          .betas = betas,
          .eps = eps,
          .weight_decay = weight_decay,
          .amsgrad = amsgrad};
}
template struct AdamWith<false>;
template struct AdamWith<true>;

Adagrad::operator OptimizerOptions() const {
  return {.kind = OptimizerKind::adagrad,
          .lr = lr,
          .eps = eps,
          .weight_decay = weight_decay,
          .lr_decay = lr_decay,
          .initial_accumulator_value = initial_accumulator_value};
}

RMSprop::operator OptimizerOptions() const {
  return {.kind = OptimizerKind::rmsprop,
          .lr = lr,
          .momentum = momentum,
          .eps = eps,
          .weight_decay = weight_decay,
          .alpha = alpha,
          .centered = centered};
}

void check(const OptimizerOptions& options, std::string_view where) {
  // What the arithmetic takes as fp32 must be finite there too.
  constexpr double kLargest = std::numeric_limits<float>::max();
  const auto require = [&](std::string_view name, double value, bool below_one) {
    const bool good = value >= 0 && (below_one ? value < 1 : value <= kLargest);
    if (good) return;
    throw ConfigError(fmt::format("{}: {} is {}", where, name, value),
                      fmt::format("{} lies in [0, {})", name, below_one ? "1" : "3.4e38"));
  };
  require("lr", options.lr, false);
  require("momentum", options.momentum, false);
  require("betas.first", options.betas.first, true);
  require("betas.second", options.betas.second, true);
  require("eps", options.eps, false);
  require("weight_decay", options.weight_decay, false);
  require("lr_decay", options.lr_decay, false);
  require("initial_accumulator_value", options.initial_accumulator_value, false);
  require("alpha", options.alpha, false);
  if (!std::isfinite(options.dampening))
    throw ConfigError(fmt::format("{}: dampening is {}", where, options.dampening));
  if (options.nesterov && (options.momentum == 0 || options.dampening != 0))
    throw ConfigError(fmt::format("{}: nesterov with momentum {} and dampening {}", where,
                                  options.momentum, options.dampening),
                      "Nesterov's method takes a momentum and no dampening");
}

UpdateKernel kernel_of(const OptimizerOptions& options) {
  using enum UpdateKernel;
  switch (options.kind) {
    case OptimizerKind::sgd:
      return options.momentum == 0 ? sgd : options.nesterov ? sgd_nesterov : sgd_momentum;
    case OptimizerKind::adam:
    case OptimizerKind::adamw:
      return options.amsgrad ? amsgrad : adam;
    case OptimizerKind::adagrad:
      return adagrad;
    case OptimizerKind::rmsprop:
      if (options.centered)
        return options.momentum == 0 ? rmsprop_centered : rmsprop_centered_momentum;
      return options.momentum == 0 ? rmsprop : rmsprop_momentum;
  }
  LOCKSTEP_CHECK(false, "unknown optimizer");
}

std::vector<std::string_view> state_names(const OptimizerOptions& options) {
  static const std::vector<std::string_view> names[kUpdateKernelCount] = {
      // by UpdateKernel
      {},
      {"momentum_buffer"},
      {"momentum_buffer"},
      {"exp_avg", "exp_avg_sq"},
      {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
      {"sum"},
      {"square_avg"},
      {"square_avg", "momentum_buffer"},
      {"square_avg", "grad_avg"},
      {"square_avg", "momentum_buffer", "grad_avg"}};
  return names[static_cast<std::size_t>(kernel_of(options))];
}

float initial_state(const OptimizerOptions& options) {
  return options.kind == OptimizerKind::adagrad
             ? static_cast<float>(options.initial_accumulator_value)
             : 0.0f;
}

StepNumbers step_numbers(const OptimizerOptions& options, std::uint64_t steps,
                         float gradient_scale) {
  const double lr = options.lr;
  StepNumbers numbers{.kernel = kernel_of(options),
                      .gradient_scale = gradient_scale,
                      .lr = static_cast<float>(lr),
                      .momentum = static_cast<float>(options.momentum),
                      .eps = static_cast<float>(options.eps)};
  if (options.kind == OptimizerKind::adamw)
    numbers.shrink = static_cast<float>(1 - lr * options.weight_decay);
  else
    numbers.weight_decay = static_cast<float>(options.weight_decay);
  const double exponent = static_cast<double>(steps);
  switch (options.kind) {
    case OptimizerKind::sgd:
      if (steps > 1) numbers.one_minus_dampening = static_cast<float>(1 - options.dampening);
      break;
    case OptimizerKind::adam:
    case OptimizerKind::adamw: {
      const auto [beta1, beta2] = options.betas;
      const double correction1 = 1 - std::pow(beta1, exponent);
      const double correction2 = 1 - std::pow(beta2, exponent);
      numbers.beta1 = static_cast<float>(beta1);
      numbers.one_minus_beta1 = static_cast<float>(1 - beta1);
      numbers.beta2 = static_cast<float>(beta2);
      numbers.one_minus_beta2 = static_cast<float>(1 - beta2);
      numbers.root_correction2 = static_cast<float>(std::sqrt(correction2));
      numbers.step_size = static_cast<float>(lr / correction1);
      break;
    }
    case OptimizerKind::adagrad:
      numbers.step_size = static_cast<float>(lr / (1 + (exponent - 1) * options.lr_decay));
      break;
    case OptimizerKind::rmsprop:
      numbers.beta2 = static_cast<float>(options.alpha);
      numbers.one_minus_beta2 = static_cast<float>(1 - options.alpha);
      break;
  }
  return numbers;
}

double sum_of_squares(std::span<const float> values) {
  double total = 0;
  for (; !values.empty(); values = values.subspan(std::min(kTileElements, values.size())))
    total += update_kernels().tile_squares(values.data(), std::min(kTileElements, values.size()));
  return total;
}

float max_magnitude(std::span<const float> values) {
  const std::uint32_t bits = update_kernels().magnitude_bits(values.data(), values.size());
  return std::bit_cast<float>(std::min(bits, 0x7f800000u));
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
