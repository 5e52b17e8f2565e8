// The flags of `lockstep run` and `lockstep train` for jobs of several nodes. One thread.
#pragma once

#include <CLI/CLI.hpp>
#include <map>
#include <optional>
#include <string>

#include "lockstep/cluster/agent.h"
#include "lockstep/cluster/environment.h"
#include "lockstep/tools/control_flags.h"

namespace lockstep {

struct NodeFlags {
  std::string nodes, endpoint, id, backend, interface, hostfile, ssh = "ssh -o BatchMode=yes";
  int rank = -1;
  double timeout_s = 1.5;
};
void add_node_flags(CLI::App& app, NodeFlags& flags);

struct NodePlace {
  NodesOptions options;
  std::string host;         // of node 0, from --rdzv-endpoint
  Environment environment;  // of the workers
};
// None: one node. Where nothing was asked for, a step of several tasks that Slurm has started is
// one of so many nodes. Says in `control` where node 0 listens. Throws ConfigError.
std::optional<NodePlace> node_place(const NodeFlags& flags, ControlFlags& control,
                                    const Environment& environment);
// A port of this machine that is free now. Only told to the workers; theirs to bind.
int free_port();

}  // namespace lockstep
