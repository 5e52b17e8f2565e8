// Arithmetic on arrays of one dtype. Torch-free, stateless; any thread. Results don't depend on
// the length of a call or on alignment: each element is computed alone, in IEEE arithmetic without
// contraction.
//
// Integers wrap around. Division of integers truncates toward zero. min and max of floating-point
// numbers give NaN if either is NaN. 16-bit floating-point operands are widened, computed in
// float32 and rounded to nearest even.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "lockstep/base/dtype.h"
#include "lockstep/collective/group.h"

namespace lockstep {

// out[i] = a[i] OP b[i]. out may be a or b.
using BinaryKernel = void (*)(void* out, const void* a, const void* b, std::size_t count);

// One instruction set's. All sets give the same bits.
struct Kernels {
  std::string_view name;  // "baseline", "avx2", "avx512"
  bool usable;            // on this machine
  // The kernel of a reduction; mean's is sum's.
  BinaryKernel (*binary)(Dtype dtype, Reduction reduction);
  // data[i] /= divisor.
  void (*divide)(void* data, Dtype dtype, std::int64_t divisor, std::size_t count);
  // Any dtype's numbers as float32, and back: 16-bit ones are rounded, integers must fit.
  void (*widen_to_float32)(float* out, const void* in, Dtype dtype, std::size_t count);
  void (*round_from_float32)(void* out, const float* in, Dtype dtype, std::size_t count);
};
std::span<const Kernels> all_kernels();
const Kernels& kernels();  // the widest that this machine has

}  // namespace lockstep
