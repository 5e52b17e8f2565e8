// What the nodes of a job tell each other before they work together, and its form in messages.
// Values; pure functions.
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "lockstep/base/deadline.h"

namespace lockstep {

// What a node's agent says to join the job.
struct NodeIntroduction {
  int rank = 0;
  std::string host = {};
  std::string agent = {};      // a name of its own, for as long as it lives
  int after = -1;              // the life that is over; -1: none
  int least = 1, workers = 1;  // on this node
  // What must be the same on all nodes, under the name that messages give it.
  std::map<std::string, std::string> same = {};
};

// What it is answered when all are there.
struct NodeWelcome {
  int node = 0;             // its life
  int first_rank = 0;       // of its first worker, at the start
  int workers = 1;          // of all nodes, at the start
  int least = 1, most = 1;  // members
  int nodes = 1;            // at the start
  int restarts = 0;         // of all workers so far
  Clock::duration lease = Clock::duration::max();
  std::string master_addr = {}, run_id = {};
  int master_port = 0;
};

nlohmann::json to_json(const NodeIntroduction& introduction);
nlohmann::json to_json(const NodeWelcome& welcome);
// Both throw ConfigError.
NodeIntroduction introduction_from(const nlohmann::json& object);
NodeWelcome welcome_from(const nlohmann::json& object);

// Throws ConfigError naming the first thing that is not the same there and here, on node 0.
void check_same(const NodeIntroduction& there, const NodeIntroduction& here);

}  // namespace lockstep
