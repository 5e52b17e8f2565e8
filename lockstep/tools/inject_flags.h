// --inject and --inject-file of the commands that start workers. One thread.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "lockstep/cluster/environment.h"
#include "lockstep/cluster/faults.h"

namespace lockstep {

struct InjectFlags {
  std::vector<std::string> faults;
  std::string file;
};

void add_inject_flags(CLI::App& app, InjectFlags& flags);
// The faults of up to `ranks` workers: single ones go to the workers, into `environment`; what is
// left is the agent's to do. Throws ConfigError.
std::vector<TimedKills> inject(const InjectFlags& flags, int ranks, Environment& environment);

}  // namespace lockstep
