// A group whose ranks can read and write one another's memory, where it is of the right kind: that
// of a node. Private to this layer.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "lockstep/collective/group.h"

namespace lockstep {

class Reachable {
 public:
  virtual ~Reachable() = default;
  // Whether the others can reach this rank's memory, as elements of a type.
  virtual bool is_reachable(std::span<const std::byte> mine, Dtype dtype) const = 0;
  // The ranks' memory by rank, each as long as its rank says; all of it reachable. What each wrote
  // before is visible to all after, until they meet again. Collective.
  virtual std::vector<std::span<std::byte>> reach(std::span<const std::byte> mine, Dtype dtype,
                                                  const CallOptions& options) = 0;
};

}  // namespace lockstep
