#include "lockstep/update/kernels.h"

// -ffp-contract=off comes from the build: a fused multiply-add would round differently where the
// machine has one. Division and square root are exact in every width.

// Told that sqrtf sets no errno, the compiler uses the machine's vector square root.
extern "C" float sqrtf(float) noexcept __attribute__((const));

#if defined(__GNUC__) && !defined(__clang__)
#define LOCKSTEP_NO_ALIAS _Pragma("GCC ivdep")
#else
#define LOCKSTEP_NO_ALIAS
#endif
#define LOCKSTEP_INLINE inline __attribute__((always_inline))

namespace lockstep {
namespace {

enum class SgdForm { plain, momentum, nesterov };

template <SgdForm form>
LOCKSTEP_INLINE void sgd_loop(const StepNumbers& numbers, const StepArrays& arrays) {
  const StepNumbers n = numbers;  // a copy: nothing the loop writes can alias it
  float* __restrict__ weights = arrays.weights;
  const float* __restrict__ gradients = arrays.gradient;
  float* __restrict__ buffer = arrays.first;
  const std::size_t count = arrays.count;
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < count; ++i) {
    const float gradient = gradients[i] * n.gradient_scale + n.weight_decay * weights[i];
    float update = gradient;
    if constexpr (form != SgdForm::plain) {
      // The buffer starts at zero, so that after the first step it is the gradient itself.
      const float velocity = n.momentum * buffer[i] + gradient;
      buffer[i] = velocity;
      update = form == SgdForm::nesterov ? gradient + n.momentum * velocity : velocity;
    }
    weights[i] = weights[i] - n.lr * update;
  }
}

LOCKSTEP_INLINE void adam_loop(const StepNumbers& numbers, const StepArrays& arrays) {
  const StepNumbers n = numbers;
  float* __restrict__ weights = arrays.weights;
  const float* __restrict__ gradients = arrays.gradient;
  float* __restrict__ first = arrays.first;
  float* __restrict__ second = arrays.second;
  const std::size_t count = arrays.count;
  LOCKSTEP_NO_ALIAS
  for (std::size_t i = 0; i < count; ++i) {
    const float weight = weights[i] * n.shrink;
    const float gradient = gradients[i] * n.gradient_scale + n.weight_decay * weight;
    const float mean = n.beta1 * first[i] + n.one_minus_beta1 * gradient;
    const float square = n.beta2 * second[i] + n.one_minus_beta2 * (gradient * gradient);
    first[i] = mean;
    second[i] = square;
    const float denominator = sqrtf(square) / n.root_correction2 + n.eps;
    weights[i] = weight - n.step_size * (mean / denominator);
  }
}

#define LOCKSTEP_VARIANT(SUFFIX, ATTRIBUTE)                                         \
  ATTRIBUTE void sgd_##SUFFIX(const StepNumbers& n, const StepArrays& a) {          \
    sgd_loop<SgdForm::plain>(n, a);                                                 \
  }                                                                                 \
  ATTRIBUTE void sgd_momentum_##SUFFIX(const StepNumbers& n, const StepArrays& a) { \
    sgd_loop<SgdForm::momentum>(n, a);                                              \
  }                                                                                 \
  ATTRIBUTE void sgd_nesterov_##SUFFIX(const StepNumbers& n, const StepArrays& a) { \
    sgd_loop<SgdForm::nesterov>(n, a);                                              \
  }                                                                                 \
  ATTRIBUTE void adam_##SUFFIX(const StepNumbers& n, const StepArrays& a) { adam_loop(n, a); }
#define LOCKSTEP_ENTRY(SUFFIX, USABLE) \
  { #SUFFIX, USABLE, sgd_##SUFFIX, sgd_momentum_##SUFFIX, sgd_nesterov_##SUFFIX, adam_##SUFFIX }

LOCKSTEP_VARIANT(baseline, )
#if defined(__x86_64__)
LOCKSTEP_VARIANT(avx2, __attribute__((target("avx2"))))
LOCKSTEP_VARIANT(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw"))))
#endif

}  // namespace

std::span<const UpdateKernels> all_update_kernels() {
#if defined(__x86_64__)
  static const UpdateKernels kernels[] = {
      LOCKSTEP_ENTRY(baseline, true),
      LOCKSTEP_ENTRY(avx2, __builtin_cpu_supports("avx2") != 0),
      LOCKSTEP_ENTRY(avx512,
                     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")),
  };
#else
  static const UpdateKernels kernels[] = {LOCKSTEP_ENTRY(baseline, true)};
#endif
  return kernels;
}

const UpdateKernels& update_kernels() {
  static const UpdateKernels& widest = []() -> const UpdateKernels& {
    const std::span<const UpdateKernels> kernels = all_update_kernels();
    std::size_t best = 0;
    for (std::size_t i = 0; i < kernels.size(); ++i)
      if (kernels[i].usable) best = i;
    return kernels[best];
  }();
  return widest;
}

}  // namespace lockstep
