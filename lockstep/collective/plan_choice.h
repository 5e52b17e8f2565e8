// Which plan an all_reduce across nodes runs: the cheapest one by latency, bandwidth and the cost
// of a message and of adding (the Hockney model, with the work of a rank besides). Pure; any
// thread.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <string_view>

namespace lockstep {

enum class AllReducePlan { to_all, direct, doubling, halving, tree, ring, engine };
std::string_view name_of(AllReducePlan plan);

// What all ranks agree on: the slowest's.
struct LinkCosts {
  double latency_s = 30e-6;            // from one rank's send to the other's receive
  double bandwidth_bytes_per_s = 1e9;  // of a rank, in each direction
  double message_s = 3e-6;             // what a message costs its sender
  double adding_bytes_per_s = 5e9;
  // The engine's own all_reduce (MPI's): of nothing, and of data. 0: it has none.
  double engine_s = 0, engine_bytes_per_s = 0;
  bool operator==(const LinkCosts&) const = default;
};

// What has been measured, by who took part: for the groups that these form again. One thread.
struct KnownLinkCosts {
  std::map<std::string, LinkCosts> by_members;
};

struct PlanChoice {
  AllReducePlan plan = AllReducePlan::direct;
  double expected_s = 0;
  std::string reason;  // "direct: 1.2 ms expected, then halving with 1.3 ms (…)"
};

// exact: only plans that add in canonical order, which depends on `size`. in_frame: what has been
// compared when data could be sent has brought it already, if it goes to all.
PlanChoice choose_all_reduce(const LinkCosts& costs, int size, std::size_t bytes, bool exact,
                             bool in_frame);

}  // namespace lockstep
