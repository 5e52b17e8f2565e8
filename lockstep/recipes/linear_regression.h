// Linear regression in closed form: every virtual rank adds its XᵀX and Xᵀy to one all-reduce, then
// all solve the normal equations. In double, in canonical order: the same bits for any number of
// workers.
#pragma once

#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/data/dataset.h"
#include "lockstep/train/batches.h"

namespace lockstep {

struct LinearSolution {
  std::vector<double> weights;  // one a feature
  double bias = 0;
};
// Throws ConfigError when XᵀX is singular (features that depend on each other).
LinearSolution solve_normal_equations(const World& world, const Dataset& train, int virtual_ranks);

}  // namespace lockstep
