// The job's workers on this node as members: what happens to them is noted here, the coordinator is
// asked, and what it answers is published in the segment. Also finds who hangs, and keeps account
// of recoveries. What is to be done with processes, the agent does. One thread; time is an
// argument.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lockstep/cluster/hang.h"
#include "lockstep/cluster/job_commands.h"
#include "lockstep/cluster/membership.h"
#include "lockstep/cluster/reconcile.h"
#include "lockstep/cluster/worker_process.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

struct MembersOptions {
  Policy policy;
  Clock::duration hang_timeout{};   // zero: who hangs is not looked for
  Clock::duration start_timeout{};  // from the start to join; zero: as long as it takes
};

class NodeMembers {
 public:
  using Emit = std::function<void(const nlohmann::json& event)>;
  // Its own events, "generation", "worker" and "recovery" (event.h), go to `emit`.
  NodeMembers(const MembersOptions& options, std::shared_ptr<Segment> segment, Emit emit,
              Clock::time_point now);

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
  bool due(Clock::time_point now) const { return changed_ || again_.expired(now); }
  Deadline again() const { return again_; }
  // Asks the coordinator, and publishes what it decides. again() and due() say when.
  Steps decide(Clock::time_point now);
  // Who hangs is to be killed. About ten times a second.
  std::vector<Condemned> look_for_hung(Clock::time_point now);

  void scale(int workers) {  // throws ConfigError
    coordinator_.scale(workers);
    changed_ = true;
  }
  // At the job's end: what has not been told yet.
  void finish() { tell_recoveries(Clock::time_point::max()); }
  JobStatus status() const;
  bool began() const { return coordinator_.generation() != nullptr; }
  // In the newest generation, else in its last one, else the one that it is started for; standbys
  // and the like have none: -1.
  int rank_of(std::uint64_t worker) const;
  bool is_member(std::uint64_t worker) const { return roster_.rank_of(worker).has_value(); }

 private:
  struct Worker {
    int seat = 0, rank = -1, pid = 0;
    Clock::time_point started = Clock::time_point::max();
  };
  // A member that died; its "recovery" is told when it is replaced, or nobody seems to come.
  struct Loss {
    int rank = -1;
    std::string cause;
    double clock = 0;
    std::uint64_t generation = 0;  // that lost it
    std::size_t members = 0;       // of that
    nlohmann::json recovery;       // null: nothing committed since
  };

  // Of a member, as of now.
  Loss loss_of(std::uint64_t worker, std::string cause, Clock::time_point now) const;
  // Also who is told to leave: until it has left, the others may be waiting for it.
  bool may_work(std::uint64_t worker) const;
  void publish(const JobGeneration& generation, Clock::time_point now);
  void recovered(const nlohmann::json& event);
  void tell_recoveries(Clock::time_point now);
  void tell(std::uint64_t worker, const char* state, const std::string& cause,
            Clock::time_point now);

  MembersOptions options_;
  std::shared_ptr<Segment> segment_;
  Emit emit_;
  Coordinator coordinator_;
  Roster roster_;
  HangWatch hangs_;
  std::map<std::uint64_t, Worker> workers_;  // those that run
  std::vector<int> vacant_;                  // ranks of members that have died
  std::vector<Loss> losses_;                 // not yet replaced
  Loss failure_;                             // the group's: what was reported first
  std::optional<std::uint64_t> step_;        // the newest committed one
  std::optional<std::uint64_t> first_step_;  // of the newest generation
  bool changed_ = true;
  Deadline again_ = Deadline::never();
};

}  // namespace lockstep
