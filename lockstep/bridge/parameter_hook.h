// The one post-accumulate hook that libtorch allows a parameter, shared by all in bridge/ that need
// one. The parameter owns it; who sets a part clears it and calls drop_hook().
//
// Threads: as for the parameter.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function_hook.h>

#include <functional>

namespace lockstep {

// Where a parameter's gradient may be written by the backward that computes it.
struct DirectPlace {
  at::Tensor place;
  int pass = -1;  // the backward that last wrote it
};

struct ParameterHook final : torch::autograd::PostAccumulateGradHook {
  void operator()(const at::Tensor&) override {
    if (on_gradient) on_gradient();
  }
  std::function<void()> on_gradient;
  DirectPlace* direct = nullptr;
};

// Null where there is none, or a hook of somebody else's.
ParameterHook* find_hook(const at::Tensor& parameter);
// Null where somebody else has one.
ParameterHook* find_or_add_hook(const at::Tensor& parameter);
// Removes the hook once no part of it is set.
void drop_hook(const at::Tensor& parameter);

}  // namespace lockstep
