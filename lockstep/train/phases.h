// Where a worker's time goes, as the report shows it. One thread.
#pragma once

#include <array>
#include <string_view>

#include "lockstep/base/deadline.h"

namespace lockstep {

enum class Phase { data, forward, backward, communication, waiting, optimizer, evaluation };
inline constexpr std::array<std::string_view, 7> kPhaseNames = {
    "data", "forward", "backward", "communication", "waiting", "optimizer", "evaluation"};

// Splits time without gaps: every moment between two marks belongs to the phase of the later mark.
class PhaseTimer {
 public:
  PhaseTimer() : last_(Clock::now()) {}
  // The time since the last mark was spent in `phase`; of it, `waiting` was spent waiting for
  // others.
  void mark(Phase phase, Clock::duration waiting = {}) {
    const Clock::time_point now = Clock::now();
    add(phase, now - last_ - waiting);
    add(Phase::waiting, waiting);
    last_ = now;
  }
  void skip() { last_ = Clock::now(); }  // belongs to no phase ("other")
  double seconds_in(Phase phase) const { return seconds(spent_[static_cast<std::size_t>(phase)]); }

 private:
  void add(Phase phase, Clock::duration time) { spent_[static_cast<std::size_t>(phase)] += time; }
  std::array<Clock::duration, kPhaseNames.size()> spent_{};
  Clock::time_point last_;
};

}  // namespace lockstep
