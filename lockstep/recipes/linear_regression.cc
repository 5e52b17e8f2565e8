#include "lockstep/recipes/linear_regression.h"

#include <algorithm>
#include <cmath>

#include "lockstep/base/error.h"
#include "lockstep/data/ledger.h"
#include "lockstep/train/tree_sum.h"

namespace lockstep {
namespace {

// Row r of [X 1] and y: `columns` = features + 1 coefficients. Adds xxᵀ and xy of the rows in range
// to `sums`, laid out as columns² + columns.
void add_products(const Dataset& data, PositionRange range, std::span<double> sums) {
  const auto features = static_cast<std::size_t>(data.sample_size());
  const std::size_t columns = features + 1;
  std::vector<double> x(columns, 1.0);
  for (std::uint64_t row = range.begin; row < range.end; ++row) {
    std::copy_n(data.values.begin() + static_cast<std::ptrdiff_t>(row * features), features,
                x.begin());
    for (std::size_t i = 0; i < columns; ++i) {
      for (std::size_t j = 0; j < columns; ++j) sums[i * columns + j] += x[i] * x[j];
      sums[columns * columns + i] += x[i] * data.targets[row];
    }
  }
}

// Solves A·w = b for a symmetric positive definite A of n × n by Cholesky's decomposition, in
// place.
std::vector<double> solve_cholesky(std::span<double> a, std::vector<double> b) {
  const std::size_t n = b.size();
  for (std::size_t j = 0; j < n; ++j) {
    for (std::size_t i = j; i < n; ++i) {
      double sum = a[i * n + j];
      for (std::size_t k = 0; k < j; ++k) sum -= a[i * n + k] * a[j * n + k];
      if (i == j && sum <= 1e-12 * a[j * n + j])
        throw ConfigError(
            "the normal equations have no single solution: features depend on each other",
            "optimizer.name = \"sgd\" finds one of the solutions");
      a[i * n + j] = i == j ? std::sqrt(sum) : sum / a[j * n + j];
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t k = 0; k < i; ++k) b[i] -= a[i * n + k] * b[k];
    b[i] /= a[i * n + i];
  }
  for (std::size_t i = n; i-- > 0;) {
    for (std::size_t k = i + 1; k < n; ++k) b[i] -= a[k * n + i] * b[k];
    b[i] /= a[i * n + i];
  }
  return b;
}

}  // namespace

LinearSolution solve_normal_equations(const World& world, const Dataset& train, int virtual_ranks) {
  const std::size_t columns = static_cast<std::size_t>(train.sample_size()) + 1;
  TreeSum<double> products(world, virtual_ranks, columns * columns + columns, "normal equations");
  products.accumulate([&](int virtual_rank, std::span<double> sums) {
    std::ranges::fill(sums, 0.0);
    add_products(train,
                 even_part(train.rows, static_cast<std::uint64_t>(virtual_ranks),
                           static_cast<std::uint64_t>(virtual_rank)),
                 sums);
  });
  const std::span<double> sums = products.reduce("normal equations");
  const std::span<double> b = sums.subspan(columns * columns);
  std::vector<double> solved = solve_cholesky(sums.first(columns * columns), {b.begin(), b.end()});
  const double bias = solved.back();
  solved.pop_back();
  return {std::move(solved), bias};
}

}  // namespace lockstep
