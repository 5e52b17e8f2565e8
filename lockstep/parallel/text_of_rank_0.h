// What one rank finds out and all must know, or fail with. Any thread; collective.
#pragma once

#include <functional>
#include <string>

#include "lockstep/cluster/world.h"

namespace lockstep {

// What make() returns on rank 0, which alone calls it, on every rank; a ConfigError that it throws
// is thrown on every rank.
std::string text_of_rank_0(const World& world, const std::function<std::string()>& make);

}  // namespace lockstep
