// The job's account of what its members' deaths cost: from the death to the next committed step,
// and to as many members as before. Pure: time is an argument. One thread.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lockstep/cluster/membership.h"

namespace lockstep {

inline double clock_of(Clock::time_point when) { return seconds(when.time_since_epoch()); }

class Recoveries {
 public:
  using Emit = std::function<void(const nlohmann::json& event)>;
  explicit Recoveries(Emit emit) : emit_(std::move(emit)) {}

  void lost(int rank, const std::string& cause, Clock::time_point now);
  void published(const GenerationPtr& generation);
  void says(int rank, const nlohmann::json& event, Clock::time_point now);
  // "recovery" events: who was replaced, or whom nobody seems to replace. max(): all.
  void tell(Clock::time_point now);

  const std::optional<std::uint64_t>& step() const { return step_; }
  const std::optional<std::uint64_t>& first_step() const { return first_step_; }

 private:
  struct Loss {
    int rank = -1;
    std::string cause;
    double clock = 0;
    std::uint64_t generation = 0;  // that lost it
    std::size_t members = 0;       // of that
    nlohmann::json recovery;       // null: nothing committed since
  };
  Loss loss_of(int rank, const std::string& cause, Clock::time_point now) const;
  void recovered(const nlohmann::json& event);

  Emit emit_;
  GenerationPtr generation_;                 // the newest
  std::vector<Loss> losses_;                 // not yet replaced
  Loss failure_;                             // the group's: what was reported first
  std::optional<std::uint64_t> step_;        // the newest committed one
  std::optional<std::uint64_t> first_step_;  // of the newest generation
};

}  // namespace lockstep
