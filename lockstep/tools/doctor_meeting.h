// Where the nodes of `lockstep doctor` meet: node 0 serves at an address that all know, over the
// control channel's encrypted messages, and each node brings what it has and gets what all have.
// One thread; node 0's server has one of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/cluster/control_key.h"

namespace lockstep {

struct MeetingOptions {
  int nodes = 1, node = 0;
  std::string address;  // node 0: ADDR:PORT to listen at; others: its endpoint, "tcp://…"
  ControlKey key;
  Clock::duration patience = std::chrono::seconds(60);  // with those who have not come
};

// This machine's clock less node 0's.
struct ClockSkew {
  double seconds = 0, uncertainty_s = 0;
};

class Meeting {
 public:
  // Throws ConfigError: node 0 cannot listen there.
  explicit Meeting(const MeetingOptions& options);
  ~Meeting();  // node 0 waits a moment for those who have not yet heard of the last gather()

  // All nodes' values by node. All call it in the same order. Throws CommError naming who has not
  // come; ConfigError: another node has this one's number, or counts other nodes.
  std::vector<nlohmann::json> gather(const nlohmann::json& mine);
  ClockSkew clock_skew();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lockstep
