// lockstep doctor across nodes: how fast each pair of them is. Free functions; measure_links()
// belongs to the thread that owns the transport.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/tools/doctor.h"
#include "lockstep/transport/transport.h"

namespace lockstep {

// The way from one node to another and back. What was not measured is 0.
struct Link {
  int from = 0, to = 0;  // from < to
  double latency_s = 0;  // one way: half of a round trip's median
  double there_bytes_per_s = 0, back_bytes_per_s = 0;
  std::string failure = {};
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Link, from, to, latency_s, there_bytes_per_s, back_bytes_per_s,
                                   failure)
Link link_from(const nlohmann::json& json, int nodes);  // throws Error: it is none

// Who measures with whom, at the same time in a round: each pair once, nobody twice in a round.
std::vector<std::vector<std::pair<int, int>>> rounds_of_pairs(int nodes);

// All ranks call it together. Returns the links that this one is the lower end of, and those that
// failed: a peer that is not heard of for `patience` is given up.
std::vector<Link> measure_links(std::unique_ptr<Transport> transport, Clock::duration patience);

// The one that each end has told of, its failure if there is any; by (from, to).
std::vector<Link> merged(std::span<const std::vector<Link>> by_node);
std::vector<Finding> findings_of(std::span<const Link> links);
// Latencies and bandwidths, a row and a column a node.
std::string table_of(std::span<const Link> links, int nodes);

}  // namespace lockstep
