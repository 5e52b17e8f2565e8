// A world's group in a wire format, between nodes alone where nodes have several ranks. Threads: as
// for the group.
#pragma once

#include <memory>

#include "lockstep/cluster/world.h"
#include "lockstep/collective/wire_format.h"

namespace lockstep {

// Keeps the world. Ends with its generation.
inline std::unique_ptr<CompressedGroup> make_wire_group(const World& world, WireFormat format) {
  const auto kept = std::make_shared<World>(world);
  const auto shared = [&](Group* group) {
    return group ? std::shared_ptr<Group>(kept, group) : nullptr;
  };
  NodeGroups nodes;
  if (world.local_sizes().size() > 1)
    nodes = {.local = shared(&world.local_group()),
             .carriers = shared(world.across_group()),
             .local_sizes = world.local_sizes(),
             .node = world.node()};
  return make_compressed_group(shared(&world.group()), format, nodes);
}

}  // namespace lockstep
