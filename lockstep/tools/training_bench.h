// `lockstep bench training`. One thread.
#pragma once

#include <string>
#include <vector>

#include "lockstep/tools/commands.h"

namespace lockstep {

// The words after `bench training`; returns the exit code, throws as every command does.
int bench_training(const std::vector<std::string>& arguments);

}  // namespace lockstep
