// Losses for Trainer::fit: (output, target) -> (sum, weight). Stateless; any thread.
#pragma once

#include <cstdint>

#include "lockstep/train/task.h"

namespace lockstep {

// Logits [n, classes, …] against classes [n, …] (int64) or probabilities [n, classes, …].
struct CrossEntropyLoss {
  LossValue operator()(const at::Tensor& output, const at::Tensor& target) const;
  std::int64_t correct(const at::Tensor& output, const at::Tensor& target) const;
};
inline constexpr CrossEntropyLoss cross_entropy;

// Of any equal shapes; the mean over all elements.
struct MeanSquaredError {
  LossValue operator()(const at::Tensor& output, const at::Tensor& target) const;
};
inline constexpr MeanSquaredError mean_squared_error;

}  // namespace lockstep
