#include "lockstep/train/losses.h"

#include <ATen/ops/argmax.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/sum.h>

namespace lockstep {

LossValue CrossEntropyLoss::operator()(const at::Tensor& output, const at::Tensor& target) const {
  const double predictions =
      static_cast<double>(output.numel()) / static_cast<double>(output.size(1));
  return {at::cross_entropy_loss(output, target, {}, at::Reduction::Sum), predictions};
}

std::int64_t CrossEntropyLoss::correct(const at::Tensor& output, const at::Tensor& target) const {
  const at::Tensor expected = target.is_floating_point() ? target.argmax(1) : target;
  return output.argmax(1).eq(expected).sum().item<std::int64_t>();
}

LossValue MeanSquaredError::operator()(const at::Tensor& output, const at::Tensor& target) const {
  return {at::mse_loss(output, target, at::Reduction::Sum), static_cast<double>(output.numel())};
}

}  // namespace lockstep
