// How far a run has come, beside the weights: what a checkpoint says, and what follows from it.
// Pure data and pure functions; any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lockstep/train/trainer.h"

namespace lockstep {

struct Progress {
  std::int64_t step = 0;             // committed, since the start
  std::uint64_t samples = 0;         // of them
  double gradient_norm = 0;          // of the last step that measured it
  std::vector<EpochSummary> epochs;  // those that are complete
  // Of the epoch under way, epochs.size() + 1:
  std::uint64_t step_of_epoch = 0;
  double loss = 0, weight = 0;
  double seconds = 0;
};
nlohmann::json to_json(const Progress& progress);
// Throws nlohmann's exceptions when a member is missing or of a wrong type.
Progress progress_from(const nlohmann::json& json);

// Why training ends after the last of the epochs, or "" to go on.
std::string stop_reason(const TrainerOptions& options, const std::vector<EpochSummary>& epochs);
// The index of the best one by options.monitor, the first of equals; nothing without a test set.
std::optional<std::size_t> best_epoch(const TrainerOptions& options,
                                      const std::vector<EpochSummary>& epochs);

// What a step's result depends on, by name, for comparing a checkpoint's with the present run's.
// Not when to stop: a run may go on for more epochs.
using JobSettings = std::vector<std::pair<std::string, std::string>>;
JobSettings settings_of(const TrainerOptions& options, const OptimizerOptions& optimizer,
                        const Schedule& schedule, std::uint64_t train_samples,
                        std::uint64_t test_samples);
// "optimizer.lr is 0.001, in the checkpoint 0.01", or "": they are equal.
std::string first_difference(const JobSettings& here, const JobSettings& in_checkpoint);

}  // namespace lockstep
