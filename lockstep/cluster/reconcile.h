// What an agent does about its coordinator's assignments: the workers of one node as a value, and
// the step from what is to what shall be. The agent executes the plan and notes what happens.
//
// Who owns what: values. Threads: one at a time. No clock, no I/O.
#pragma once

#include <climits>
#include <deque>
#include <map>
#include <utility>

#include "lockstep/cluster/membership.h"

namespace lockstep {

struct NodePlan {
  // In this order.
  GenerationPtr publish;  // null: nothing new. At once if JobGeneration::at_once
  // Generations below are over: waits in them end, and nobody enters one any more. May be above the
  // newest: a member is lost, and what follows must wait for its end, or for a replacement.
  std::uint64_t over = 0;
  std::vector<std::uint64_t> kill;  // incarnations: SIGKILL (the roster has them as dying)
  std::vector<int> reset;           // dead seats that nobody needs any more
  std::vector<int> start;           // a worker at each of these seats, then note started()
  std::optional<JobEnd> end;
};

class Roster {
 public:
  // lease: without an answer for so long the node ends its workers; below Policy::node_timeout by
  // the time that this may take. max(): never, as where the coordinator is in the same process.
  // most: living workers, whatever seats there are.
  Roster(int node, int seats, Clock::duration lease = Clock::duration::max(), int most = INT_MAX);
  void introduce(int rank, std::string host);  // as what the report names the node

  // --- What happens. Of a worker whose seat was given to another: ignored ---
  std::uint64_t started(int seat, int pid);       // its incarnation
  void runs(std::uint64_t incarnation, int pid);  // where it was not known yet
  void ready(std::uint64_t incarnation, std::string address = {});
  void killing(std::uint64_t incarnation, std::string cause);  // it hangs: SIGKILL is being sent
  // Its end was seen: its pidfd is readable and it is reaped. The cause of killing() goes first.
  void ended(std::uint64_t incarnation, WorkerState state, std::string cause,
             bool failed_for_good = false);
  void comm_error(std::uint64_t incarnation, std::uint64_t generation, std::string message);
  // All its members have taken over what was left of older generations.
  void entered(std::uint64_t generation);
  void committed(std::uint64_t step, std::uint64_t generation);  // generation: that committed it

  // --- Talking to the coordinator ---
  NodeReport report(Clock::time_point now);  // whole, with a version of its own
  NodePlan follow(const Assignment& assignment);
  NodePlan expire(Clock::time_point now);  // kills all when the lease is over

  const std::vector<WorkerReport>& workers() const { return report_.workers; }
  const WorkerReport* find(std::uint64_t incarnation) const;
  std::optional<std::size_t> rank_of(std::uint64_t incarnation) const;  // in the newest generation

 private:
  WorkerReport* known(std::uint64_t incarnation);

  int seats_;
  int most_;
  Clock::duration lease_;
  NodeReport report_;
  std::uint64_t term_ = 0;
  std::uint64_t over_ = 0;
  std::uint64_t acknowledged_ = 0;
  std::uint64_t entered_ = 0;  // the newest generation that all its members have
  std::deque<std::pair<std::uint64_t, Clock::time_point>> sent_;  // versions not yet acknowledged
  Clock::time_point lease_from_{};
  std::map<std::uint64_t, std::uint64_t> told_;  // in which version an incarnation's end was first
};

}  // namespace lockstep
