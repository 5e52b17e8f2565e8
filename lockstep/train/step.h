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
  struct Step {
    std::uint64_t epoch = 0;     // these three from 0
    std::uint64_t of_epoch = 0;  // the step within it
    std::int64_t number = 0;     // and since the start
    double lr = 0;
    bool measure = false;  // the gradient's norm
  };
  // Computes; the step's outcome is fixed. Throws Error naming step and rank when a loss or a
  // gradient is not finite; nothing has been updated then.
  StepOutcome decide(const Step& step, const Ledger::Epoch& order);
  void update(std::span<const std::byte> note);

 private:
  std::uint64_t pieces(const Step& step) const;
  VirtualLoss compute(const Step& step, const Ledger::Epoch& order, int virtual_rank,
                      std::uint64_t pieces);
  void compute_piece(const Step& step, const Ledger::Epoch& order, PositionRange range, bool last,
                     VirtualLoss& sum);

  const Task& task_;
  SharedWeights& weights_;
  const BatchSource& data_;
  const Ledger& ledger_;
  const TrainerOptions& options_;
  PhaseTimer& timer_;
  std::vector<std::uint64_t> indices_;
};

}  // namespace lockstep
