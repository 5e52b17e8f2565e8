// One step of synchronous data parallelism: compute my virtual ranks, reduce in canonical order,
// decide, update. Owned by the trainer; one thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/data/ledger.h"
#include "lockstep/train/flat_module.h"
#include "lockstep/train/phases.h"
#include "lockstep/train/trainer.h"
#include "lockstep/train/tree_sum.h"

namespace lockstep {

struct StepResult {
  double loss_sum = 0;
  double weight = 0;
  double gradient_norm = 0;  // of the mean gradient, before clipping
};

class StepExecutor {
 public:
  StepExecutor(const World& world, const Task& task, FlatModule& module, Optimizer& optimizer,
               const BatchSource& data, const Ledger& ledger, const TrainerOptions& options,
               PhaseTimer& timer);
  // Step `step` of epoch `epoch`, the `number`-th since the start (all from 0), at learning rate
  // lr. Throws Error naming step and rank when a loss or a gradient is not finite; nothing has been
  // updated then.
  StepResult run(const Ledger::Epoch& epoch, std::uint64_t step, std::int64_t number, double lr);

 private:
  void compute(const Ledger::Epoch& epoch, std::uint64_t step, std::int64_t number);
  void compute_virtual_rank(const Ledger::Epoch& epoch, PositionRange range, int virtual_rank,
                            std::int64_t number, std::span<float> slot);
  void share_losses();
  [[noreturn]] void refuse_non_finite(const Ledger::Epoch& epoch, std::uint64_t step,
                                      std::int64_t number);
  void agree_on_integer_buffers(std::uint64_t step);

  const World& world_;
  const Task& task_;
  FlatModule& module_;
  Optimizer& optimizer_;
  const BatchSource& data_;
  const Ledger& ledger_;
  const TrainerOptions& options_;
  PhaseTimer& timer_;

  TreeSum<float> sum_;
  std::vector<std::uint64_t> indices_;
  std::vector<double> losses_;  // [virtual rank] {sum, weight}
};

}  // namespace lockstep
