// Matrix products by the fastest library in libtorch for this machine. libtorch takes MKL for fp32,
// and MKL keeps its AVX-512 code for Intel's processors: elsewhere oneDNN's is more than twice as
// fast.
//
// Which one is taken follows from the machine, the shape and the element type alone. Both add in
// fp32; their bits differ. Any thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lockstep {

// a [m, k] times b [k, n], either of them transposed or not, plus `bias` [n] in every row, if
// given: a new tensor. Autograd does not see it.
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b,
                          const std::optional<at::Tensor>& bias = {});
// The same into `out`, which is contiguous and whose values before don't matter.
void matrix_product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
// Whether this product is oneDNN's.
bool takes_onednn(const at::Tensor& a, const at::Tensor& b);

}  // namespace lockstep
