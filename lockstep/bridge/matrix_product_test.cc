#include "lockstep/bridge/matrix_product.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace lockstep {
namespace {

// Small ones are libtorch's own, large ones may not be: near a product in fp64, and the same again.
TEST(MatrixProduct, IsRightForEveryShapeAndTransposition) {
  at::manual_seed(1);
  for (const std::int64_t m : {1, 7, 200, 513})
    for (const std::int64_t k : {1, 130, 384})
      for (const std::int64_t n : {3, 65, 260}) {
        const at::Tensor a = at::randn({m, k}), b = at::randn({k, n}), bias = at::randn({n});
        const at::Tensor expected = at::mm(a.to(at::kDouble), b.to(at::kDouble));
        const at::Tensor transposed[] = {a.t().contiguous().t(), b.t().contiguous().t()};
        for (const at::Tensor& left : {a, transposed[0]})
          for (const at::Tensor& right : {b, transposed[1]}) {
            const at::Tensor product = matrix_product(left, right);
            EXPECT_TRUE(at::allclose(product.to(at::kDouble), expected, 1e-4, 1e-4))
                << m << " " << k << " " << n;
            EXPECT_TRUE(at::equal(product, matrix_product(left, right)));
            at::Tensor out = at::full({m, n}, std::numeric_limits<float>::quiet_NaN());
            matrix_product_into(out, left, right);
            EXPECT_TRUE(at::equal(out, product));
            EXPECT_TRUE(
                at::allclose(matrix_product(left, right, bias), product + bias, 1e-4, 1e-4));
          }
      }
}

TEST(MatrixProduct, OneDnnIsForLargeMatricesOfFp32) {
  EXPECT_FALSE(takes_onednn(at::ones({8, 8}), at::ones({8, 8})));
  EXPECT_FALSE(takes_onednn(at::ones({512, 512}, at::kDouble), at::ones({512, 512}, at::kDouble)));
}

}  // namespace
}  // namespace lockstep
