// The events that every kind of fit sends to the agent (observe/event.h). Pure but for the clocks
// they read.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>

#include "lockstep/cluster/world.h"
#include "lockstep/train/phases.h"
#include "lockstep/train/trainer.h"

namespace lockstep {

nlohmann::json ready_event(const World& world, std::uint64_t train_samples,
                           std::uint64_t test_samples, std::uint64_t parameters,
                           std::uint64_t steps_per_epoch, std::int64_t epochs);
nlohmann::json first_step_event();
nlohmann::json epoch_event(const EpochSummary& summary);
nlohmann::json rank_event(const World& world, const PhaseTimer& timer);
nlohmann::json finished_event(const std::string& reason, std::int64_t epochs, std::int64_t steps);
// Seconds on the clock that the agent reads too.
double monotonic_clock();

}  // namespace lockstep
