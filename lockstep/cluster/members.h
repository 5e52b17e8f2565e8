// The job's workers on this node as members: what happens to them is noted here and reported, and
// what the coordinator assigns is published in the segment. Also finds who hangs. What is to be
// done with processes, the agent does. One thread; time is an argument.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lockstep/cluster/hang.h"
#include "lockstep/cluster/job_nodes.h"
#include "lockstep/cluster/membership.h"
#include "lockstep/cluster/reconcile.h"
#include "lockstep/cluster/worker_process.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

struct Generation;

struct MembersOptions {
  NodeWelcome welcome;  // this node's place in the job
  NodeIntroduction self;
  int standby = 0;                  // workers more than `self.workers`
  Clock::duration hang_timeout{};   // zero: who hangs is not looked for
  Clock::duration start_timeout{};  // from the start to join; zero: as long as it takes
};

class NodeMembers {
 public:
  using Emit = std::function<void(const nlohmann::json& event)>;
  // Its own events, "worker" (event.h), and but for node 0 "generation" without ranks, go to
  // `emit`.
  NodeMembers(const MembersOptions& options, std::shared_ptr<Segment> segment, Emit emit);

  // --- What happens to a worker, named by its incarnation ---
  std::uint64_t start(int seat);  // is going to be started
  void runs(std::uint64_t worker, int pid, Clock::time_point now);
  void says(std::uint64_t worker, const nlohmann::json& event, Clock::time_point now);
  void ended(std::uint64_t worker, const Ending& ending, Clock::time_point now);

  // --- What is to be done ---
  struct Condemned {
    std::uint64_t worker = 0;
    std::string cause;
  };
  struct Steps {
    std::vector<Condemned> kill;
    std::vector<int> start;  // a worker at each of these seats
    std::optional<JobEnd> end;
  };
  bool changed() const { return changed_; }  // there is something to report
  NodeReport report(Clock::time_point now);
  // Publishes what the coordinator decided.
  Steps follow(const Assignment& assignment, Clock::time_point now);
  // Where the coordinator has not been heard for too long, all workers are to be killed.
  bool lease_is_over(Clock::time_point now);
  // Who hangs is to be killed. About ten times a second.
  std::vector<Condemned> look_for_hung(Clock::time_point now);

  bool began() const { return generation_ != nullptr; }
  int size() const { return generation_ ? static_cast<int>(generation_->members.size()) : 0; }
  // In the newest generation, else in its last one, else the one that it is started for; standbys
  // and the like have none: -1.
  int rank_of(std::uint64_t worker) const;
  bool is_member(std::uint64_t worker) const { return roster_.rank_of(worker).has_value(); }

 private:
  struct Worker {
    int seat = 0, rank = -1, pid = 0;
    Clock::time_point started = Clock::time_point::max();
  };

  bool is_here(const Member& member) const { return member.node == options_.welcome.node; }
  // Also who is told to leave: until it has left, the others may be waiting for it.
  bool may_work(std::uint64_t worker) const;
  void list_nodes(const std::vector<Member>& members, Generation& board) const;
  int free_seat() const;
  void publish(const JobGeneration& generation, Clock::time_point now);
  void tell(std::uint64_t worker, const char* state, const std::string& cause,
            Clock::time_point now);

  MembersOptions options_;
  std::shared_ptr<Segment> segment_;
  Emit emit_;
  Roster roster_;
  HangWatch hangs_;
  GenerationPtr generation_;                 // the newest that is published here
  std::map<std::uint64_t, Worker> workers_;  // those that run
  std::vector<int> vacant_;                  // ranks of members that have died
  std::optional<std::uint64_t> step_;        // the newest committed one
  bool changed_ = true;
};

}  // namespace lockstep
