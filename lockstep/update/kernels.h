// The loops of the optimizers, one variant for each instruction set; all give the same bits.
// Internal to update/. Pure functions of their arguments; any thread.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace lockstep {

// The numbers of one step, rounded to fp32 once, as PyTorch rounds a Python or C++ scalar.
struct StepNumbers {
  float gradient_scale = 1;
  float weight_decay = 0;  // added to the gradient
  float shrink = 1;        // adamw: weights *= shrink first
  float lr = 0;            // sgd
  float momentum = 0;      // sgd
  float beta1 = 0;
  float one_minus_beta1 = 1;
  float beta2 = 0;
  float one_minus_beta2 = 1;
  float root_correction2 = 1;  // sqrt(1 - beta2^steps)
  float eps = 0;
  float step_size = 0;  // lr / (1 - beta1^steps)
};

struct StepArrays {
  float* weights;
  const float* gradient;
  float* first;   // null for sgd without momentum
  float* second;  // adam
  std::size_t count;
};

struct UpdateKernels {
  using Step = void (*)(const StepNumbers&, const StepArrays&);
  std::string_view name;
  bool usable;  // on this machine
  Step sgd;
  Step sgd_momentum;
  Step sgd_nesterov;
  Step adam;  // also adamw: weight_decay or shrink tells them apart
};

// Baseline first, the widest last.
std::span<const UpdateKernels> all_update_kernels();
// The widest usable ones.
const UpdateKernels& update_kernels();

}  // namespace lockstep
