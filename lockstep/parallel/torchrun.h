// Worlds of several nodes under torchrun: its ranks find each other through its own store.
#pragma once

#include <string>
#include <vector>

#include "lockstep/cluster/world.h"

namespace lockstep {

std::vector<std::string> exchange_over_torchrun(const Place& place, const std::string& mine);

inline const bool kMeetsByTorchrun = meet_by(Launcher::torchrun, exchange_over_torchrun);

}  // namespace lockstep
