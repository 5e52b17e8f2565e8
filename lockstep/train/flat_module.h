// A module as the trainer works with it: parameters in one flat, 64-byte aligned fp32 memory, and
// what one virtual rank contributes to a step as one run of fp32: its gradients, then its float
// buffers (batch norm's running statistics), to be summed over the canonical tree as a whole.
//
// The module keeps the memory alive, and must outlive this. One thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "lockstep/bridge/flat_parameters.h"

namespace torch::nn {
class Module;
}

namespace lockstep {

class FlatModule {
 public:
  // Moves the parameters. Throws ConfigError naming a parameter or floating-point buffer that is
  // not float32.
  explicit FlatModule(torch::nn::Module& module);

  std::span<float> weights() const { return weights_; }
  std::size_t parameter_count() const;  // without the padding between tensors
  std::size_t gradient_size() const { return parameter_layout_.total; }  // floats
  std::size_t contribution_size() const {
    return parameter_layout_.total + buffer_layout_.total;
  }  // floats

  // Before a virtual rank's forward: every buffer as it was committed.
  void restore_buffers();
  // After its backward: gradients and float buffers into `slot`; gradients become undefined again.
  void collect(std::span<float> slot);
  // The step is decided: float buffers become sum / count; integer buffers stay as the last forward
  // left them.
  void commit_buffers(std::span<const float> sum, int count);

  // Buffers of other types, one byte span each: equal on all ranks that computed something.
  std::vector<std::span<std::byte>> integer_buffers() const;

  // Every parameter, and every buffer as it was committed, by name: what a snapshot holds, whatever
  // a forward that failed has done to the live buffers.
  std::vector<NamedTensor> state() const;
  bool is_finite() const;  // all of it

 private:
  std::vector<NamedTensor> parameters_;
  std::vector<NamedTensor> float_buffers_;
  std::vector<NamedTensor> integer_buffers_;
  std::vector<at::Tensor> parameter_tensors_;
  std::vector<at::Tensor> float_buffer_tensors_;
  ParameterLayout parameter_layout_;
  ParameterLayout buffer_layout_;
  at::Tensor storage_;
  std::span<float> weights_;
  std::vector<at::Tensor> committed_floats_;
  std::vector<at::Tensor> committed_integers_;
};

}  // namespace lockstep
