// What is trained, seen from the training loop: a module with its forward, a loss, and the data as
// batches of tensors. Holds references and closures; used by the one thread that trains.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

namespace torch::nn {
class Module;
}

namespace lockstep {

struct Batch {
  at::Tensor input;   // [n, …] float32
  at::Tensor target;  // [n] int64 classes, [n, classes] float32 one-hot, or [n, outputs] float32;
                      // undefined: no labels
};

// A source of samples by index. Any rank makes any batch; the same indices give the same bits.
class BatchSource {
 public:
  virtual ~BatchSource() = default;
  virtual std::uint64_t size() const = 0;
  virtual Batch batch(std::span<const std::uint64_t> indices) const = 0;
  // As batch(), for training in epoch `epoch` (from 0): random changes (augmentation) follow from
  // the epoch and a sample's index.
  virtual Batch training_batch(std::span<const std::uint64_t> indices,
                               std::uint64_t /*epoch*/) const {
    return batch(indices);
  }
};

// Losses return the sum over the batch and the weight it stands for, undivided: the update divides
// once, so that short, masked or padded batches are averaged exactly.
struct LossValue {
  at::Tensor sum;  // scalar
  double weight = 0;
};

struct Task {
  std::shared_ptr<torch::nn::Module> module;
  std::function<at::Tensor(const at::Tensor& input)> forward;
  std::function<LossValue(const at::Tensor& output, const at::Tensor& target)> loss;
  // How much of the loss's weight, the batch's samples, is predicted right; empty where accuracy
  // means nothing (regression).
  std::function<std::int64_t(const at::Tensor& output, const at::Tensor& target)> correct;
};

}  // namespace lockstep
