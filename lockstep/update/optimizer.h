// Optimizers' arithmetic on spans of fp32, torch-free: what torch::optim's SGD, Adam and AdamW
// compute, in one pass over memory. The order of operations is fixed: the same inputs give the same
// bits for any split of the span into slices, any alignment and any instruction set. An Optimizer
// belongs to one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace lockstep {

enum class OptimizerKind : std::uint8_t { sgd, adam, adamw };

struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::adam;
  double momentum = 0.0;  // sgd
  bool nesterov = false;  // sgd
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;  // sgd, adam: added to the gradient; adamw: decoupled
};

class Optimizer {
 public:
  Optimizer(const OptimizerOptions& options, std::size_t count);
  // weights -= update(gradient * gradient_scale) at learning rate lr. gradient_scale is where a
  // summed gradient is divided by its weight and clipped. Both spans hold `count` elements and do
  // not overlap.
  void step(std::span<float> weights, std::span<const float> gradient, float gradient_scale,
            double lr);
  std::int64_t steps() const { return steps_; }

 private:
  OptimizerOptions options_;
  std::int64_t steps_ = 0;
  std::size_t count_ = 0;
  std::vector<float> first_;   // momentum buffer, or Adam's first moment
  std::vector<float> second_;  // Adam's second moment
};

// Sum of squares in double: partial sums over fixed tiles of 1,024 elements, added in tile order.
// Same bits for any caller.
double sum_of_squares(std::span<const float> values);

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
