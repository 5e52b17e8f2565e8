// The training loop of one worker: synchronous data parallelism in canonical order, evaluation,
// stopping, snapshots. The result is the same, bit for bit, for any number of workers up to
// virtual_ranks (DESIGN, "The canonical tree").
//
// One Trainer a process, one thread. All ranks construct it and call fit() with equal arguments.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lockstep/bridge/autocast.h"
#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/cluster/world.h"
#include "lockstep/data/partition.h"
#include "lockstep/train/task.h"
#include "lockstep/update/optimizer.h"

namespace lockstep {

struct TrainerOptions {
  std::int64_t epochs = 10;
  std::int64_t max_steps = 0;  // 0: no limit
  std::int64_t global_batch_size = 64;
  int virtual_ranks = 1;
  std::uint64_t seed = 1;
  bool shuffle = true;
  Partition partition = {};     // which samples go together; of the training set's samples
  double clip_grad_norm = 0.0;  // 0: off
  Precision precision = Precision::fp32;  // of forward passes; weights and updates are fp32
  // Stop when the loss (or the gradient norm) of an epoch differs less than this from the epoch's
  // before; 0: off.
  double tolerance = 0.0;
  bool tolerance_of_gradient_norm = false;
  bool print_test_loss = false;
  std::int64_t evaluation_batch_size = 500;
  // Saved beside the module's tensors in every snapshot.
  std::vector<NamedTensor> extra_tensors = {};
};

struct EpochSummary {
  std::int64_t epoch = 0;  // from 1
  std::int64_t step = 0;   // committed steps since the start
  double train_loss = 0;
  bool evaluated = false;
  double test_loss = 0;
  bool has_accuracy = false;
  double test_accuracy = 0;
  double gradient_norm = 0;  // of the epoch's last step, before clipping
};

struct Evaluation {
  double loss = 0;      // mean over the samples
  double accuracy = 0;  // 0 to 1
  std::uint64_t samples = 0;
};
// Every sample once, split over the ranks in fixed batches; the same bits for any number of ranks.
// Collective.
Evaluation evaluate(const World& world, const Task& task, const BatchSource& data,
                    std::int64_t batch_size);

class Trainer {
 public:
  Trainer(World world, TrainerOptions options);
  // Trains `task` in place. `test` may be null. Emits events (observe/event.h) to the world's
  // agent. Throws Error on a non-finite loss or gradient (the weights stay those of the last good
  // step, and are saved), ConfigError on settings that do not fit the data, CommError.
  std::vector<EpochSummary> fit(const Task& task, const OptimizerOptions& optimizer,
                                const Schedule& schedule, const BatchSource& train,
                                const BatchSource* test);

 private:
  World world_;
  TrainerOptions options_;
};

}  // namespace lockstep
