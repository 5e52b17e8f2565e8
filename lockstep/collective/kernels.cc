#include "lockstep/collective/kernels.h"

#include <bit>
#include <type_traits>

#include "lockstep/base/error.h"
#include "lockstep/base/instruction_sets.h"

// Compiles the functions up to LOCKSTEP_TARGET_END for an instruction set.
#if defined(__clang__)
#define LOCKSTEP_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define LOCKSTEP_TARGET_AVX2 \
  LOCKSTEP_PRAGMA(clang attribute push(__attribute__((target("avx2"))), apply_to = function))
#define LOCKSTEP_TARGET_AVX512          \
  LOCKSTEP_PRAGMA(clang attribute push( \
      __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function))
#define LOCKSTEP_TARGET_END _Pragma("clang attribute pop")
#else
#define LOCKSTEP_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2\")")
#define LOCKSTEP_TARGET_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl\")")
#define LOCKSTEP_TARGET_END _Pragma("GCC pop_options")
#endif

namespace lockstep {
namespace {

namespace baseline {
#include "lockstep/collective/kernels_body.inc"
}

#if defined(__x86_64__)
LOCKSTEP_TARGET_AVX2
namespace avx2 {
#include "lockstep/collective/kernels_body.inc"
}
LOCKSTEP_TARGET_END

LOCKSTEP_TARGET_AVX512
namespace avx512 {
#include "lockstep/collective/kernels_body.inc"
}
LOCKSTEP_TARGET_END
#endif

#define LOCKSTEP_KERNELS(SET, USABLE) \
  { #SET, USABLE, SET::binary_kernel, SET::divide, SET::widen_to_float32, SET::round_from_float32 }

}  // namespace

std::span<const Kernels> all_kernels() {
  static const Kernels sets[] = {
    LOCKSTEP_KERNELS(baseline, true),
#if defined(__x86_64__)
    LOCKSTEP_KERNELS(avx2, has_avx2()),
    LOCKSTEP_KERNELS(avx512, has_avx512()),
#endif
  };
  return sets;
}

const Kernels& kernels() {
  static const Kernels& best = widest(all_kernels());
  return best;
}

}  // namespace lockstep
