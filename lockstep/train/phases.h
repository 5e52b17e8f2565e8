// Where a worker's time goes, as the report shows it. One thread.
#pragma once

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "lockstep/base/deadline.h"
#include "lockstep/cluster/world.h"
#include "lockstep/collective/comm_queue.h"

namespace lockstep {

enum class Phase { data, forward, backward, communication, waiting, optimizer, evaluation };
inline constexpr std::array<std::string_view, 7> kPhaseNames = {
    "data", "forward", "backward", "communication", "waiting", "optimizer", "evaluation"};

// This process's processor time so far, user and system, in seconds.
double cpu_seconds();

// Splits time without gaps: every moment between two marks belongs to the phase of the later mark,
// except what the group spent waiting for other ranks meanwhile.
class PhaseTimer {
 public:
  explicit PhaseTimer(World world)
      : world_(std::move(world)), last_(started_), waited_(world_.group().statistics().waiting) {}

  // The time since the last mark was spent in `phase`.
  void mark(Phase phase) {
    world_.made_progress();
    const Clock::time_point now = Clock::now();
    // Between nodes a queue's thread may be in the group while this one computes.
    Clock::duration waited{};
    if (phase >= Phase::communication || world_.local_sizes().size() == 1) {
      const Clock::duration all = world_.group().statistics().waiting;
      waited = std::min(all - std::exchange(waited_, all), now - last_);
    }
    spent(phase) += now - last_ - waited;
    spent(Phase::waiting) += waited;
    last_ = now;
  }
  // What this generation's queue has been used for so far.
  void queue(const CommQueue::Statistics& now) {
    queued_.busy += now.busy - queue_.busy;
    queued_.exposed += now.exposed - queue_.exposed;
    queue_ = now;
  }
  const CommQueue::Statistics& queued() const { return queued_; }
  // The world has another group, and there is another queue.
  void enter_generation() {
    waited_ = world_.group().statistics().waiting;
    queue_ = {};
  }
  double seconds_in(Phase phase) const { return seconds(spent_[static_cast<std::size_t>(phase)]); }
  double total_seconds() const { return seconds(Clock::now() - started_); }
  double total_cpu_seconds() const { return cpu_seconds() - cpu_at_start_; }

 private:
  Clock::duration& spent(Phase phase) { return spent_[static_cast<std::size_t>(phase)]; }

  const World world_;
  const Clock::time_point started_ = Clock::now();
  const double cpu_at_start_ = cpu_seconds();
  std::array<Clock::duration, kPhaseNames.size()> spent_{};
  Clock::time_point last_;
  Clock::duration waited_;
  CommQueue::Statistics queue_, queued_;  // of this generation; of all
};

}  // namespace lockstep
