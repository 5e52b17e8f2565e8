#include "lockstep/bridge/matrix_product.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "lockstep/base/instruction_sets.h"

// Exported by libtorch, without a header. Weak: without it, libtorch's own choice.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out,
                                         float beta, float alpha);
}

namespace lockstep {
namespace {

// Below, finding the primitive costs what it gains.
constexpr std::int64_t kLeastProducts = 1 << 22;

bool prefers_onednn() {
  static const bool prefers = &at::native::mkldnn_matmul != nullptr && at::hasMKLDNN() &&
                              at::hasMKL() && has_avx512() && !is_intel();
  return prefers;
}

}  // namespace

bool takes_onednn(const at::Tensor& a, const at::Tensor& b) {
  return prefers_onednn() && at::globalContext().userEnabledMkldnn() &&
         a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
         a.size(0) * a.size(1) * b.size(1) >= kLeastProducts;
}

void matrix_product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (takes_onednn(a, b))
    at::native::mkldnn_matmul(a, b, out, 0, 1);
  else
    at::mm_out(out, a, b);
}

at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b,
                          const std::optional<at::Tensor>& bias) {
  if (!takes_onednn(a, b)) return bias ? at::addmm(*bias, a, b) : at::mm(a, b);
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  at::native::mkldnn_matmul(a, b, out, 0, 1);
  return bias ? out.add_(*bias) : out;
}

}  // namespace lockstep
