// Optimizers' arithmetic on spans of fp32, torch-free: what torch::optim's SGD, Adam, AdamW,
// Adagrad and RMSprop compute, in one pass over memory. The order of operations is fixed: the same
// inputs give the same bits for any split of the span into slices, any alignment and any
// instruction set. Pure; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "lockstep/update/kernels.h"

namespace lockstep {

enum class OptimizerKind : std::uint8_t { sgd, adam, adamw, adagrad, rmsprop };

// Any of them, with torch::optim's names.
struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::adam;
  double lr = 1e-3;
  double momentum = 0;                             // sgd, rmsprop
  double dampening = 0;                            // sgd
  bool nesterov = false;                           // sgd, with momentum and without dampening
  std::pair<double, double> betas = {0.9, 0.999};  // adam, adamw
  double eps = 1e-8;                               // all but sgd
  double weight_decay = 0;                         // added to the gradient; adamw: decoupled
  bool amsgrad = false;                            // adam, adamw
  double lr_decay = 0;                             // adagrad
  double initial_accumulator_value = 0;            // adagrad
  double alpha = 0.99;                             // rmsprop
  bool centered = false;                           // rmsprop
};

// One of them, with torch::optim's defaults: Adam({.lr = 1e-3}).
struct SGD {
  double lr = 1e-3;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool nesterov = false;
  operator OptimizerOptions() const;
};
template <bool decoupled>  // the weight decay, from the gradient
struct AdamWith {
  double lr = 1e-3;
  std::pair<double, double> betas = {0.9, 0.999};
  double eps = 1e-8;
  double weight_decay = decoupled ? 1e-2 : 0;
  bool amsgrad = false;
  operator OptimizerOptions() const;
};
using Adam = AdamWith<false>;
using AdamW = AdamWith<true>;
struct Adagrad {
  double lr = 1e-2;
  double lr_decay = 0;
  double weight_decay = 0;
  double initial_accumulator_value = 0;
  double eps = 1e-10;
  operator OptimizerOptions() const;
};
struct RMSprop {
  double lr = 1e-2;
  double alpha = 0.99;
  double eps = 1e-8;
  double weight_decay = 0;
  double momentum = 0;
  bool centered = false;
  operator OptimizerOptions() const;
};

// Throws ConfigError naming the option that is out of torch::optim's range, and `where` ("parameter
// group 1").
void check(const OptimizerOptions& options, std::string_view where);
UpdateKernel kernel_of(const OptimizerOptions& options);
// PyTorch's names of the state arrays, in the kernel's order: exp_avg, exp_avg_sq, …
std::vector<std::string_view> state_names(const OptimizerOptions& options);
// What every element of every state array starts with.
float initial_state(const OptimizerOptions& options);
// The numbers of the `steps`-th update (from 1) at learning rate options.lr. gradient_scale is
// where a summed gradient is divided by its weight, unscaled and clipped.
StepNumbers step_numbers(const OptimizerOptions& options, std::uint64_t steps,
                         float gradient_scale);

// Sum of squares in double: partial sums over fixed tiles of 1,024 elements, added in tile order.
// Same bits for any caller.
inline constexpr std::size_t kTileElements = 1024;
double sum_of_squares(std::span<const float> values);
// The largest |x|; infinity if any is infinite or no number.
float max_magnitude(std::span<const float> values);
// Whether contributions whose largest magnitudes add up to this have a finite sum, whatever the
// values and the order: docs/shared-weights.md, "Is it finite?". If not, it must be measured.
inline bool sum_is_finite(double magnitudes) { return magnitudes < 0x1p127; }

// The learning rate of a step (from 0). Pure.
struct Schedule {
  enum class Kind : std::uint8_t { constant, linear, cosine, step } kind = Kind::constant;
  double lr = 1e-3;
  double min_lr = 0.0;            // cosine: the rate at total_steps and after
  std::int64_t warmup_steps = 0;  // linear, cosine: lr * (step + 1) / warmup_steps, at first
  std::int64_t total_steps = 1;   // cosine
  std::int64_t step_size = 1;     // step: in steps
  double gamma = 0.1;
};
double learning_rate(const Schedule& schedule, std::int64_t step);

}  // namespace lockstep
