// For tests alone: the optimizers and a whole update of shared weights written as plainly as
// possible, to hold the real ones to. Every intermediate result passes through memory: no fusing,
// no widening.
#pragma once

#include <cmath>
#include <vector>

#include "lockstep/update/step_record.h"

namespace lockstep::naive {

inline volatile float rounded;
inline float r(float value) {
  rounded = value;
  return rounded;
}

// One element: its weight and its state arrays, after a gradient.
inline void update_element(const StepNumbers& n, float gradient, float& weight, float* state) {
  using enum UpdateKernel;
  const float w = r(weight * n.shrink);
  const float g = r(r(gradient * n.gradient_scale) + r(n.weight_decay * w));
  switch (n.kernel) {
    case sgd:
      weight = r(w - r(n.lr * g));
      return;
    case sgd_momentum:
    case sgd_nesterov: {
      state[0] = r(r(n.momentum * state[0]) + r(n.one_minus_dampening * g));
      const float update = n.kernel == sgd_nesterov ? r(g + r(n.momentum * state[0])) : state[0];
      weight = r(w - r(n.lr * update));
      return;
    }
    case adam:
    case amsgrad: {
      state[0] = r(r(n.beta1 * state[0]) + r(n.one_minus_beta1 * g));
      state[1] = r(r(n.beta2 * state[1]) + r(n.one_minus_beta2 * r(g * g)));
      float square = state[1];
      if (n.kernel == amsgrad) square = state[2] = std::fmax(state[2], square);
      const float denominator = r(r(r(std::sqrt(square)) / n.root_correction2) + n.eps);
      weight = r(w - r(n.step_size * r(state[0] / denominator)));
      return;
    }
    case adagrad:
      state[0] = r(state[0] + r(g * g));
      weight = r(w - r(n.step_size * r(g / r(r(std::sqrt(state[0])) + n.eps))));
      return;
    case rmsprop:
    case rmsprop_momentum:
    case rmsprop_centered:
    case rmsprop_centered_momentum: {
      const bool momentum = n.kernel == rmsprop_momentum || n.kernel == rmsprop_centered_momentum;
      const bool centered = n.kernel == rmsprop_centered || n.kernel == rmsprop_centered_momentum;
      state[0] = r(r(n.beta2 * state[0]) + r(n.one_minus_beta2 * r(g * g)));
      float square = state[0];
      if (centered) {
        float& mean = state[momentum ? 2 : 1];
        mean = r(r(n.beta2 * mean) + r(n.one_minus_beta2 * g));
        square = std::fmax(0.0f, r(square - r(mean * mean)));
      }
      float update = r(g / r(r(std::sqrt(square)) + n.eps));
      if (momentum) update = state[1] = r(r(n.momentum * state[1]) + update);
      weight = r(w - r(n.lr * update));
      return;
    }
  }
}

// tree(lo, hi) of the virtual ranks' contributions to one element, by the definition.
inline float tree(const std::vector<std::vector<float>>& contributions, std::size_t element, int lo,
                  int hi) {
  if (hi - lo == 1) return contributions[static_cast<std::size_t>(lo)][element];
  int half = 1;
  while (half * 2 < hi - lo) half *= 2;
  return r(tree(contributions, element, lo, lo + half) +
           tree(contributions, element, lo + half, hi));
}

// The sum of squares as the protocol defines it: tiles of 1,024 elements, 16 lanes in each, of the
// elements that belong to a parameter group.
inline double squares(const UpdateSpec& spec, const std::vector<float>& sum) {
  double total = 0;
  for (std::size_t tile = 0; tile < sum.size(); tile += 1024) {
    double lanes[16] = {};
    for (const UpdateRange& range : spec.ranges)
      for (std::size_t i = range.begin; i < range.end && range.group >= 0; ++i)
        if (i >= tile && i < tile + 1024)
          lanes[i % 16] += static_cast<double>(sum[i]) * static_cast<double>(sum[i]);
    double partial = 0;
    for (const double lane : lanes) partial += lane;
    total += partial;
  }
  return total;
}

// One copy of the weights that one process updates alone.
struct Weights {
  UpdateSpec spec;
  std::vector<float> weights;
  std::vector<std::vector<float>> states;  // [array][element]
  std::uint64_t steps = 0;

  explicit Weights(UpdateSpec what) : spec(std::move(what)), weights(spec.elements) {
    states.assign(static_cast<std::size_t>(spec.state_arrays()), std::vector<float>(spec.elements));
    for (const UpdateRange& range : spec.ranges)
      for (std::size_t i = range.begin; i < range.end && range.group >= 0; ++i)
        for (auto& state : states)
          state[i] = initial_state(spec.groups[static_cast<std::size_t>(range.group)]);
  }

  // [virtual rank][element]; options are the step's. Returns the gradient's norm.
  double step(const std::vector<std::vector<float>>& contributions, double total_weight,
              int averaged_over, const std::vector<OptimizerOptions>& groups, double max_norm) {
    std::vector<float> sum(spec.elements);
    for (std::size_t i = 0; i < sum.size(); ++i)
      sum[i] = tree(contributions, i, 0, static_cast<int>(contributions.size()));
    ++steps;
    double scale = 1.0 / total_weight;
    const double norm = std::sqrt(squares(spec, sum)) / total_weight;
    if (max_norm > 0 && norm > max_norm) scale *= max_norm / norm;
    for (const UpdateRange& range : spec.ranges) {
      for (std::size_t i = range.begin; i < range.end; ++i) {
        if (range.group == UpdateRange::kAverage) {
          weights[i] = sum[i] / static_cast<float>(averaged_over);
          continue;
        }
        const StepNumbers numbers = step_numbers(groups[static_cast<std::size_t>(range.group)],
                                                 steps, static_cast<float>(scale));
        float state[kMaxStateArrays] = {};
        for (std::size_t k = 0; k < states.size(); ++k) state[k] = states[k][i];
        update_element(numbers, sum[i], weights[i], state);
        for (std::size_t k = 0; k < states.size(); ++k) states[k][i] = state[k];
      }
    }
    return norm;
  }
};

}  // namespace lockstep::naive

namespace lockstep {

// Nothing naive: the kernels on whole spans of one process.
class Optimizer {
 public:
  Optimizer(const OptimizerOptions& options, std::size_t count)
      : options_(options),
        states_(state_names(options).size(), std::vector<float>(count, initial_state(options))) {}
  void step(std::span<float> weights, std::span<const float> gradient, float gradient_scale,
            double lr) {
    options_.lr = lr;
    const StepNumbers numbers = step_numbers(options_, ++steps_, gradient_scale);
    StepArrays arrays{.gradient = gradient.data(),
                      .weights = weights.data(),
                      .states = {},
                      .new_weights = weights.data(),
                      .new_states = {},
                      .count = weights.size()};
    for (std::size_t i = 0; i < states_.size(); ++i)
      arrays.states[i] = arrays.new_states[i] = states_[i].data();
    update_kernels().step(numbers.kernel)(numbers, arrays);
  }

 private:
  OptimizerOptions options_;
  std::uint64_t steps_ = 0;
  std::vector<std::vector<float>> states_;
};

}  // namespace lockstep
