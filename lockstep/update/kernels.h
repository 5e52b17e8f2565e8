// The loops of the optimizers, one variant for each instruction set; all give the same bits.
// Internal to update/. Pure functions of their arguments; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace lockstep {

// Which loop makes a step. Values are part of the step record's format: never renumber.
enum class UpdateKernel : std::uint32_t {
  sgd,
  sgd_momentum,
  sgd_nesterov,
  adam,  // also adamw: weight_decay or shrink tells them apart
  amsgrad,
  adagrad,
  rmsprop,
  rmsprop_momentum,
  rmsprop_centered,
  rmsprop_centered_momentum,
};
inline constexpr std::size_t kUpdateKernelCount = 10;
inline constexpr int kMaxStateArrays = 3;
int state_arrays(UpdateKernel kernel);  // how many it reads and writes beside the weights

// The numbers of one step, rounded to fp32 once, as PyTorch rounds a Python or C++ scalar.
struct StepNumbers {
  UpdateKernel kernel = UpdateKernel::sgd;
  float gradient_scale = 1;
  float weight_decay = 0;  // added to the gradient
  float shrink = 1;        // adamw: weights *= shrink first
  float lr = 0;            // sgd, rmsprop
  float momentum = 0;      // sgd, rmsprop
  float one_minus_dampening = 1;
  float beta1 = 0;
  float one_minus_beta1 = 1;
  float beta2 = 0;  // rmsprop's alpha
  float one_minus_beta2 = 1;
  float root_correction2 = 1;  // sqrt(1 - beta2^steps)
  float eps = 0;
  float step_size = 0;  // adam: lr / (1 - beta1^steps); adagrad: lr / (1 + (steps - 1) lr_decay)
};

// Before and after may be the same memory; nothing else may overlap. State arrays that the kernel
// does not use may be null.
struct StepArrays {
  const float* gradient;
  const float* weights;
  std::array<const float*, kMaxStateArrays> states;
  float* new_weights;
  std::array<float*, kMaxStateArrays> new_states;
  std::size_t count;
};

struct UpdateKernels {
  using Step = void (*)(const StepNumbers&, const StepArrays&);
  std::string_view name;
  bool usable;  // on this machine
  std::array<Step, kUpdateKernelCount> steps;
  // The sum of squares of at most 1,024 elements in 16 lanes: element i belongs to lane i % 16.
  double (*tile_squares)(const float* values, std::size_t count);
  // The bits of the largest |x|; above 0x7f7fffff: something is infinite or no number.
  std::uint32_t (*magnitude_bits)(const float* values, std::size_t count);

  Step step(UpdateKernel kernel) const { return steps[static_cast<std::size_t>(kernel)]; }
};

// Baseline first, the widest last.
std::span<const UpdateKernels> all_update_kernels();
// The widest usable ones.
const UpdateKernels& update_kernels();

}  // namespace lockstep
