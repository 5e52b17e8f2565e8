// One step of synchronous data parallelism: compute my virtual ranks, decide, update. Owned by the
// trainer; one thread.
#pragma once

#include <cstdint>
#include <vector>

#include "lockstep/data/ledger.h"
#include "lockstep/parallel/shared_weights.h"
#include "lockstep/train/phases.h"
#include "lockstep/train/trainer.h"

namespace lockstep {

class StepExecutor {
 public:
  StepExecutor(const Task& task, SharedWeights& weights, const BatchSource& data,
               const Ledger& ledger, const TrainerOptions& options, PhaseTimer& timer);
  // Step `step` of epoch `epoch`, the `number`-th since the start (all from 0), at learning rate
  // lr. Throws Error naming step and rank when a loss or a gradient is not finite; nothing has been
  // updated then.
  StepOutcome run(const Ledger::Epoch& epoch, std::uint64_t step, std::int64_t number, double lr,
                  bool measure);

 private:
  VirtualLoss compute(const Ledger::Epoch& epoch, PositionRange range, int virtual_rank,
                      std::int64_t number);

  const Task& task_;
  SharedWeights& weights_;
  const BatchSource& data_;
  const Ledger& ledger_;
  const TrainerOptions& options_;
  PhaseTimer& timer_;
  std::vector<std::uint64_t> indices_;
};

}  // namespace lockstep
