#include "lockstep/update/kernels.h"

#include <bit>

#include "lockstep/base/instruction_sets.h"

// -ffp-contract=off comes from the build: a fused multiply-add would round differently where the
// machine has one. Division and square root are exact in every width.

// Told that sqrtf sets no errno, the compiler uses the machine's vector square root.
extern "C" float sqrtf(float) noexcept __attribute__((const));

#if defined(__clang__)
#define LOCKSTEP_NO_ALIAS _Pragma("clang loop vectorize(assume_safety)")
#else
#define LOCKSTEP_NO_ALIAS _Pragma("GCC ivdep")
#endif
#define LOCKSTEP_INLINE inline __attribute__((always_inline))

namespace lockstep {
namespace {

// Each loop copies numbers and pointers first: nothing that it writes can alias them.

template <bool has_momentum, bool nesterov>
LOCKSTEP_INLINE void sgd_loop(const StepNumbers& numbers, const StepArrays& arrays) {
  const StepNumbers n = numbers;
  const StepArrays a = arrays;
  const float* const buffer = a.states[0];
  float* const new_buffer = a.new_states[0];
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < a.count; ++i) {
    const float weight = a.weights[i];
    const float gradient = a.gradient[i] * n.gradient_scale + n.weight_decay * weight;
    float update = gradient;
    if constexpr (has_momentum) {
      // The buffer starts at zero and the first step is not dampened, so that after it the buffer
      // is the gradient itself.
      const float velocity = n.momentum * buffer[i] + n.one_minus_dampening * gradient;
      new_buffer[i] = velocity;
      update = nesterov ? gradient + n.momentum * velocity : velocity;
    }
    a.new_weights[i] = weight - n.lr * update;
  }
}

template <bool amsgrad>
LOCKSTEP_INLINE void adam_loop(const StepNumbers& numbers, const StepArrays& arrays) {
  const StepNumbers n = numbers;
  const StepArrays a = arrays;
  const auto [means, squares, largests] = a.states;
  const auto [new_means, new_squares, new_largests] = a.new_states;
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < a.count; ++i) {
    const float weight = a.weights[i] * n.shrink;
    const float gradient = a.gradient[i] * n.gradient_scale + n.weight_decay * weight;
    const float mean = n.beta1 * means[i] + n.one_minus_beta1 * gradient;
    float square = n.beta2 * squares[i] + n.one_minus_beta2 * (gradient * gradient);
    new_means[i] = mean;
    new_squares[i] = square;
    if constexpr (amsgrad) {
      square = square < largests[i] ? largests[i] : square;  // keeps what is no number
      new_largests[i] = square;
    }
    const float denominator = sqrtf(square) / n.root_correction2 + n.eps;
    a.new_weights[i] = weight - n.step_size * (mean / denominator);
  }
}

LOCKSTEP_INLINE void adagrad_loop(const StepNumbers& numbers, const StepArrays& arrays) {
  const StepNumbers n = numbers;
  const StepArrays a = arrays;
  const float* const sums = a.states[0];
  float* const new_sums = a.new_states[0];
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < a.count; ++i) {
    const float weight = a.weights[i];
    const float gradient = a.gradient[i] * n.gradient_scale + n.weight_decay * weight;
    const float sum = sums[i] + gradient * gradient;
    new_sums[i] = sum;
    a.new_weights[i] = weight - n.step_size * (gradient / (sqrtf(sum) + n.eps));
  }
}

template <bool centered, bool has_momentum>
LOCKSTEP_INLINE void rmsprop_loop(const StepNumbers& numbers, const StepArrays& arrays) {
  constexpr int kMean = has_momentum ? 2 : 1;
  const StepNumbers n = numbers;
  const StepArrays a = arrays;
  const float* const squares = a.states[0];
  const float* const buffer = a.states[1];
  const float* const means = a.states[kMean];
  float* const new_squares = a.new_states[0];
  float* const new_buffer = a.new_states[1];
  float* const new_means = a.new_states[kMean];
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < a.count; ++i) {
    const float weight = a.weights[i];
    const float gradient = a.gradient[i] * n.gradient_scale + n.weight_decay * weight;
    float square = n.beta2 * squares[i] + n.one_minus_beta2 * (gradient * gradient);
    new_squares[i] = square;
    if constexpr (centered) {
      const float mean = n.beta2 * means[i] + n.one_minus_beta2 * gradient;
      new_means[i] = mean;
      // A variance: what rounding makes negative is zero (PyTorch takes its square root).
      square = square - mean * mean;
      square = square < 0 ? 0 : square;
    }
    float update = gradient / (sqrtf(square) + n.eps);
    if constexpr (has_momentum) {
      update = n.momentum * buffer[i] + update;
      new_buffer[i] = update;
    }
    a.new_weights[i] = weight - n.lr * update;
  }
}

LOCKSTEP_INLINE double squares_loop(const float* values, std::size_t count) {
  constexpr std::size_t kLanes = 16;  // fixed, so that the bits don't depend on the machine
  double lanes[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (std::size_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] += static_cast<double>(values[i + lane]) * static_cast<double>(values[i + lane]);
  for (; i < count; ++i)
    lanes[i % kLanes] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

LOCKSTEP_INLINE std::uint32_t magnitude_loop(const float* values, std::size_t count) {
  std::int32_t largest = 0;  // signed: without its sign bit, a number's bits are positive
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t bits = std::bit_cast<std::int32_t>(values[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return static_cast<std::uint32_t>(largest);
}

using Step = UpdateKernels::Step;
template <Step... loops>
struct Loops {};
// In UpdateKernel's order.
using AllLoops =
    Loops<sgd_loop<false, false>, sgd_loop<true, false>, sgd_loop<true, true>, adam_loop<false>,
          adam_loop<true>, adagrad_loop, rmsprop_loop<false, false>, rmsprop_loop<false, true>,
          rmsprop_loop<true, false>, rmsprop_loop<true, true>>;

#define LOCKSTEP_VARIANT(SET, TARGET)                                                            \
  namespace SET {                                                                                \
  template <Step loop>                                                                           \
  TARGET void step(const StepNumbers& n, const StepArrays& a) {                                  \
    loop(n, a);                                                                                  \
  }                                                                                              \
  template <Step... loops>                                                                       \
  constexpr std::array<Step, kUpdateKernelCount> steps(Loops<loops...>) {                        \
    return {step<loops>...};                                                                     \
  }                                                                                              \
  TARGET double squares(const float* v, std::size_t n) { return squares_loop(v, n); }            \
  TARGET std::uint32_t magnitude(const float* v, std::size_t n) { return magnitude_loop(v, n); } \
  }
#define LOCKSTEP_ENTRY(SET, USABLE) \
  { #SET, USABLE, SET::steps(AllLoops()), SET::squares, SET::magnitude }

LOCKSTEP_VARIANT(baseline, )
#if defined(__x86_64__)
LOCKSTEP_VARIANT(avx2, __attribute__((target("avx2"))))
LOCKSTEP_VARIANT(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw"))))
#endif

}  // namespace

int state_arrays(UpdateKernel kernel) {
  constexpr std::array<int, kUpdateKernelCount> kCounts = {0, 1, 1, 2, 3, 1, 1, 2, 2, 3};
  return kCounts[static_cast<std::size_t>(kernel)];
}

std::span<const UpdateKernels> all_update_kernels() {
  static const UpdateKernels kernels[] = {
    LOCKSTEP_ENTRY(baseline, true),
#if defined(__x86_64__)
    LOCKSTEP_ENTRY(avx2, has_avx2()),
    LOCKSTEP_ENTRY(avx512, has_avx512()),
#endif
  };
  return kernels;
}

const UpdateKernels& update_kernels() {
  static const UpdateKernels& best = widest(all_update_kernels());
  return best;
}

}  // namespace lockstep
