// A run's progress as it lies beside the shared weights, for workers that take it up: a note that
// is committed with every step, and a log of the epochs that are over, which local rank 0 writes
// between steps. Pure but for the memory it is given; one thread.
#pragma once

#include <cstddef>
#include <span>

#include "lockstep/train/progress.h"

namespace lockstep {

inline constexpr std::int64_t kMaxEpochs = 1 << 20;

struct StepNote {
  std::int64_t step = 0;
  std::uint64_t samples = 0;
  std::uint64_t epochs = 0;  // complete before this step
  std::uint64_t step_of_epoch = 0;
  double loss = 0, weight = 0, seconds = 0, gradient_norm = 0;
};
StepNote note_of(const Progress& progress);

// Of a log for so many epochs.
std::size_t epoch_log_bytes(std::int64_t epochs);
// Local rank 0: these epochs are over.
void write_log(std::span<std::byte> log, const std::vector<EpochSummary>& epochs);
// After the step of the note, or after the epoch that it was the last step of, if the log says that
// the epoch is over. Throws Error if the log is damaged.
Progress progress_from(std::span<const std::byte> note, std::span<std::byte> log);

}  // namespace lockstep
