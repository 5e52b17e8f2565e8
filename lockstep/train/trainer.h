// The training loop of one worker: synchronous data parallelism in canonical order, evaluation,
// stopping, checkpoints. The result is the same, bit for bit, for any number of workers up to
// virtual_ranks, and for a run that was interrupted and resumed (docs/architecture.md, "The
// canonical tree", "Checkpoints").
//
//   Trainer trainer(world, {.epochs = 10, .global_batch_size = 128, .checkpoint_dir = "run"});
//   auto report = trainer.fit(net, Adam({.lr = 1e-3}), train_set, test_set, cross_entropy);
//
// One fit() at a time, one thread. All ranks construct it and call fit() with equal arguments.
#pragma once

#include <concepts>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lockstep/bridge/autocast.h"
#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/cluster/world.h"
#include "lockstep/collective/wire_kernels.h"
#include "lockstep/data/partition.h"
#include "lockstep/train/map_batches.h"
#include "lockstep/train/task.h"
#include "lockstep/update/optimizer.h"

namespace lockstep {

struct EpochSummary {
  std::int64_t epoch = 0;  // from 1
  std::int64_t step = 0;   // committed steps since the start
  double train_loss = 0;
  bool evaluated = false;
  double test_loss = 0;
  bool has_accuracy = false;
  double test_accuracy = 0;
  double gradient_norm = 0;   // of the epoch's last step that measured it, before clipping
  double lr = 0;              // of the last step
  std::uint64_t samples = 0;  // since the start
  double seconds = 0;         // training alone
  double evaluation_seconds = 0;
};

struct StepSummary {
  std::int64_t epoch = 0;  // from 1
  std::int64_t step = 0;   // committed steps since the start, this one included
  double loss = 0;         // mean over the step's samples
  double lr = 0;
};

struct CheckpointSummary {
  std::int64_t step = 0;
  std::filesystem::path path;  // being written; the one before it is whole
  bool best = false;           // by `monitor`, of all epochs so far
};

// Called in the loop, on every rank, on_checkpoint on rank 0. on_step and on_epoch return whether
// to go on: training stops, everywhere, after the step or epoch for which any rank returns false.
struct TrainerCallbacks {
  std::function<bool(const StepSummary&)> on_step = {};
  std::function<bool(const EpochSummary&)> on_epoch = {};
  std::function<void(const CheckpointSummary&)> on_checkpoint = {};
};

enum class Monitor { test_loss, test_accuracy };

struct TrainerOptions {
  std::int64_t epochs = 10;
  std::int64_t max_steps = 0;  // 0: no limit
  std::int64_t global_batch_size = 64;
  int virtual_ranks = 0;        // 0: one a rank, or what the checkpoint says
  std::int64_t accumulate = 1;  // micro-batches that a virtual rank's batch is computed in
  std::uint64_t seed = 1;
  bool shuffle = true;
  // Which of the training samples go together. (Not `= {}`: GCC 12 then warns, falsely, where
  // options are given in braces.)
  Partition partition = Partition();
  double clip_grad_norm = 0.0;                // 0: off
  Precision precision = Precision::fp32;      // of training's forward passes; the rest is fp32
  WireFormat wire_format = WireFormat::fp32;  // of gradients between nodes (shared_weights.h)
  std::optional<Schedule> schedule = {};      // of the learning rate, which is the optimizer's
  // Stop when the loss (or the gradient norm) of an epoch differs less than this from the epoch's
  // before; 0: off.
  double tolerance = 0.0;
  bool tolerance_of_gradient_norm = false;
  // Stop after so many epochs in which `monitor` did not become better by more than min_delta;
  // 0: off.
  std::int64_t patience = 0;
  double min_delta = 0.0;
  Monitor monitor = Monitor::test_loss;
  bool print_test_loss = false;
  std::int64_t evaluation_batch_size = 500;

  // A folder for checkpoints, DIR/step-00000123; "": none. Saved are every so many epochs and steps
  // (0: never), each epoch that is the best one by `monitor`, and the end. Kept are the last
  // `checkpoint_keep` and the best one.
  std::filesystem::path checkpoint_dir = {};
  std::int64_t checkpoint_every_epochs = 1;
  std::int64_t checkpoint_every_steps = 0;
  int checkpoint_keep = 1;
  bool resume = false;  // go on from the newest whole checkpoint there, if there is any
  // More that the result depends on, by name: a checkpoint goes on where it is equal, and nowhere
  // else. The options above that matter are compared anyway.
  std::vector<std::pair<std::string, std::string>> job = {};

  TrainerCallbacks callbacks = {};
  // Saved beside the module's tensors in every snapshot for the agent.
  std::vector<NamedTensor> extra_tensors = {};
};

struct FitReport {
  std::vector<EpochSummary> epochs;  // those before a resumption included
  std::int64_t steps = 0;
  std::string stopped_because;
  std::int64_t resumed_step = 0;                // 0: from the start
  std::vector<std::string> broken_checkpoints;  // newer than the one resumed: what is wrong
  std::optional<std::int64_t> best_epoch;       // by `monitor`
  bool preempted = false;                       // the job was asked to stop: resume it to go on
  bool is_member = true;  // false: the job goes on without this worker; the rest is empty
};

struct Evaluation {
  double loss = 0;      // mean over the samples
  double accuracy = 0;  // of the weight, 0 to 1
  std::uint64_t samples = 0;
};
// Every sample once, split over the ranks in fixed batches; the same bits for any number of ranks.
// Collective.
Evaluation evaluate(const World& world, const Task& task, const BatchSource& data,
                    std::int64_t batch_size);

template <typename Loss>
concept LossFunction = requires(const Loss& loss, const at::Tensor& tensor) {
  { loss(tensor, tensor) } -> std::convertible_to<LossValue>;
};

class Trainer {
 public:
  Trainer(World world, TrainerOptions options);
  // Trains `task` in place. `test` may be null. Emits events (observe/event.h) to the world's
  // agent. Where that replaces workers who die, this goes on with what the others have committed;
  // then a program's first fit() is the one that a new worker joins. Throws Error on a non-finite
  // loss or gradient (the weights stay those of the last good step, and are saved) and where a
  // checkpoint cannot be written, ConfigError on settings that do not fit the data and on a
  // checkpoint of another job, CommError.
  FitReport fit(const Task& task, const OptimizerOptions& optimizer, const Schedule& schedule,
                const BatchSource& train, const BatchSource* test);

  // `net`: a TORCH_MODULE holder or a std::shared_ptr to a module. `train`, `test`: a BatchSource,
  // or a data set with size() and get(index) or get_batch(indices), as torch::data's. `loss`:
  // losses.h, or any function (output, target) -> LossValue; with a member correct() accuracy is
  // measured, too.
  template <typename Net, typename Train, typename Test, LossFunction Loss>
  FitReport fit(const Net& net, const OptimizerOptions& optimizer, const Train& train,
                const Test& test, const Loss& loss) {
    const BatchSourceOf<Test> test_source(test);
    return fit(task_of(net, loss), optimizer, schedule_of(optimizer), BatchSourceOf<Train>(train),
               &static_cast<const BatchSource&>(test_source));
  }
  // Without a test set.
  template <typename Net, typename Train, LossFunction Loss>
  FitReport fit(const Net& net, const OptimizerOptions& optimizer, const Train& train,
                const Loss& loss) {
    return fit(task_of(net, loss), optimizer, schedule_of(optimizer), BatchSourceOf<Train>(train),
               static_cast<const BatchSource*>(nullptr));
  }

 private:
  template <typename Net, typename Loss>
  static Task task_of(const Net& net, const Loss& loss) {
    Task task;
    if constexpr (requires { net.ptr(); })
      task.module = net.ptr();
    else
      task.module = net;
    task.forward = [net](const at::Tensor& input) {
      return const_cast<Net&>(net)->forward(input);  // a holder is a pointer
    };
    task.loss = loss;
    if constexpr (requires(const at::Tensor& t) { loss.correct(t, t); })
      task.correct = [loss](const at::Tensor& output, const at::Tensor& target) {
        return loss.correct(output, target);
      };
    return task;
  }
  Schedule schedule_of(const OptimizerOptions& optimizer) const {
    Schedule schedule = options_.schedule.value_or(Schedule{});
    schedule.lr = optimizer.lr;
    return schedule;
  }

  World world_;
  TrainerOptions options_;
};

}  // namespace lockstep
