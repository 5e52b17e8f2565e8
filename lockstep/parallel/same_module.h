// Whether a module is the same on every rank, and making its values so. Collective; the caller owns
// everything.
#pragma once

#include <span>

#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/collective/group.h"

namespace lockstep {

// Compares names, shapes, dtypes, devices and requires_grad. Throws ConfigError, the same on every
// rank, with the first that differs.
void check_same_module(Group& group, std::span<const NamedTensor> parameters,
                       std::span<const NamedTensor> buffers);

// Root's values on all ranks. Throws ConfigError naming a tensor that is not dense or not on the
// CPU.
void broadcast_values(Group& group, std::span<const NamedTensor> tensors, int root = 0);

}  // namespace lockstep
