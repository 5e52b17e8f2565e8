// For tests alone: a job whose messages arrive at once, to tell stories of its membership.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lockstep/cluster/membership.h"
#include "lockstep/cluster/reconcile.h"

namespace lockstep::membership_story {

using Words = std::vector<std::string>;
constexpr auto kKilled = "killed by signal 9 (SIGKILL)";

// A job on a few nodes whose messages arrive at once. Worker n of node k has pid 100 k + n.
class Job {
 public:
  explicit Job(Policy policy, int nodes = 1, int seats = 16)
      : policy_(policy), coordinator_(std::in_place, policy, now) {
    for (int node = 0; node < nodes; ++node) rosters.emplace_back(node, seats);
  }

  // Until nothing is to be done any more; what was said meanwhile.
  Words settle() {
    Words said;
    for (bool changed = true; changed;) {
      for (Roster& roster : rosters) coordinator_->take(roster.report(now), now);
      const Decision decision = coordinator_->decide(now);
      said.insert(said.end(), decision.reasons.begin(), decision.reasons.end());
      again = decision.again;
      end = decision.end;
      changed = decision.published != nullptr;
      for (std::size_t i = 0; i < rosters.size(); ++i) {
        const NodePlan plan = rosters[i].follow(coordinator_->assignment(static_cast<int>(i)));
        over = plan.over;
        for (const std::uint64_t killed : plan.kill)
          rosters[i].ended(killed, WorkerState::failed, kKilled);
        for (const int seat : plan.start)
          rosters[i].started(seat, static_cast<int>(100 * i + rosters[i].workers().size()));
        changed |= !plan.start.empty() || !plan.kill.empty() || !plan.reset.empty();
      }
    }
    return said;
  }
  // All that start become ready.
  Words ready() {
    for (Roster& roster : rosters)
      for (const WorkerReport& worker : roster.workers())
        if (worker.state == WorkerState::starting) roster.ready(worker.incarnation);
    return settle();
  }
  Words die(std::uint64_t incarnation, const std::string& cause = kKilled, std::size_t node = 0) {
    rosters[node].ended(incarnation, WorkerState::failed, cause);
    return settle();
  }
  Words finish(std::uint64_t incarnation) {
    rosters[0].ended(incarnation, WorkerState::finished, "");
    return settle();
  }
  Words commit() {
    ++step;
    for (Roster& roster : rosters) roster.committed(step, coordinator_->generation()->number);
    return settle();
  }
  Words later(Clock::duration duration) {
    now += duration;
    return settle();
  }
  Words scale(int workers) {
    coordinator_->scale(workers);
    return settle();
  }
  void restart_the_coordinator() { coordinator_.emplace(policy_, now, ++term_); }
  // Begins, and commits a step.
  void begin() {
    settle();
    ready();
    commit();
  }

  std::vector<std::uint64_t> members() const {
    std::vector<std::uint64_t> incarnations;
    for (const Member& member : coordinator_->generation()->members)
      incarnations.push_back(member.incarnation);
    return incarnations;
  }
  const JobGeneration& generation() const { return *coordinator_->generation(); }
  bool began() const { return coordinator_->generation() != nullptr; }
  Coordinator& coordinator() { return *coordinator_; }

  Clock::time_point now{std::chrono::seconds(1000)};
  std::vector<Roster> rosters;
  std::optional<Clock::time_point> again;
  std::optional<JobEnd> end;
  std::uint64_t over = 0;
  std::uint64_t step = 0;

 private:
  Policy policy_;
  std::optional<Coordinator> coordinator_;
  std::uint64_t term_ = 0;
};

}  // namespace lockstep::membership_story
