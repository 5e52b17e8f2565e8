// Collectives on memory of CUDA devices, one device a rank: NCCL moves the bytes. Its ranks meet
// through a group of the host's first, which compares their calls, and knows who is late or gone.
//
// NCCL adds floating-point numbers in an order of its own: under GroupOptions::exact these
// reductions pass through the host's group instead.
#pragma once

#include <memory>
#include <string>

#include "lockstep/collective/group.h"

namespace lockstep {

// Why this build or this machine has none; "": it has.
std::string nccl_unavailable();
// Of the ranks of `host`, on the calling thread's current device, which all spans name memory of.
// Throws ConfigError where nccl_unavailable() says why.
std::unique_ptr<Group> make_nccl_group(std::shared_ptr<Group> host,
                                       const GroupOptions& options = {});

}  // namespace lockstep
