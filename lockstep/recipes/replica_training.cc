#include "lockstep/recipes/replica_training.h"

#include <ATen/Context.h>
#include <fmt/format.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/cluster/fault_injector.h"
#include "lockstep/data/ledger.h"
#include "lockstep/observe/event.h"
#include "lockstep/parallel/clip_grad_norm.h"
#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/local_sgd.h"
#include "lockstep/recipes/optimizer.h"
#include "lockstep/train/events.h"
#include "lockstep/train/progress.h"
#include "lockstep/train/snapshot.h"

namespace lockstep {
namespace {

constexpr Clock::duration kProgressInterval = std::chrono::milliseconds(100);

std::vector<NamedTensor> snapshot_tensors(const Task& task, const TrainerOptions& options) {
  std::vector<NamedTensor> tensors = named_parameters(*task.module);
  for (const auto& more : {named_buffers(*task.module), options.extra_tensors})
    tensors.insert(tensors.end(), more.begin(), more.end());
  return tensors;
}

class ReplicaTraining {
 public:
  ReplicaTraining(const World& world, const Job& job, const TrainerOptions& options,
                  const Task& task, const Schedule& schedule, const BatchSource& train,
                  const BatchSource* test)
      : world_(world),
        options_(options),
        task_(task),
        schedule_(schedule),
        train_(train),
        test_(test),
        ledger_({.samples = train.size(),
                 .global_batch_size = static_cast<std::uint64_t>(options.global_batch_size),
                 .virtual_ranks = world.size(),
                 .seed = options.seed,
                 .shuffle = options.shuffle,
                 .partition = options.partition}),
        steps_per_epoch_(ledger_.steps_per_epoch()),
        optimizer_(torch_optimizer(job.optimizer, task.module->parameters())),
        timer_(world),
        faults_(world),
        snapshots_(world, snapshot_tensors(task, options)) {
    if (ledger_.batch_size(steps_per_epoch_ - 1) < static_cast<std::uint64_t>(world.size()))
      --steps_per_epoch_;
    if (steps_per_epoch_ == 0)
      throw ConfigError(
          fmt::format("{} workers for {} training samples", world.size(), train.size()),
          fmt::format("--workers {} or fewer", train.size()));
    const WireFormat format = options.wire_format;
    const int every = static_cast<int>(job.train.sync_every);
    if (job.train.strategy == "data_parallel")
      replica_.emplace(*task.module, world, DataParallelOptions{.wire_format = format});
    else if (job.train.strategy == "local_sgd")
      local_ = std::make_unique<LocalSgd>(
          *task.module, world, LocalSgdOptions{.sync_every = every, .wire_format = format});
    else
      local_ = std::make_unique<DiLoCo>(*task.module, world,
                                        DiLoCoOptions{.sync_every = every, .wire_format = format});
  }

  FitReport go() {
    std::uint64_t parameters = 0;
    for (const at::Tensor& one : task_.module->parameters())
      parameters += static_cast<std::uint64_t>(one.numel());
    if (world_.rank() == 0)
      world_.events().emit(ready_event(world_, train_.size(), test_ == nullptr ? 0 : test_->size(),
                                       parameters, steps_per_epoch_, options_.epochs));
    task_.module->train();
    FitReport report;
    while (report.stopped_because.empty()) {
      run_epoch(report);
      report.stopped_because = stop_reason(options_, report.epochs);
    }
    world_.events().emit(rank_event(world_, timer_));
    if (world_.rank() == 0)
      world_.events().emit(finished_event(
          report.stopped_because, static_cast<std::int64_t>(report.epochs.size()), report.steps));
    return report;
  }

 private:
  void run_epoch(FitReport& report) {
    const Clock::time_point started = Clock::now();
    const auto epoch = report.epochs.size();
    const Ledger::Epoch order = ledger_.epoch(epoch);
    double sums[2] = {};  // loss and weight, in the end of all ranks
    EpochSummary summary{.epoch = static_cast<std::int64_t>(epoch) + 1};
    for (std::uint64_t step = 0; step < steps_per_epoch_; ++step) {
      if (options_.max_steps > 0 && report.steps >= options_.max_steps) break;
      const auto [loss, weight] = run_step(epoch, order, step, report.steps++, summary);
      sums[0] += loss, sums[1] += weight, samples_ += ledger_.batch_size(step);
      report_step(summary, report.steps, loss / weight);
    }
    if (local_) local_->synchronize();
    world_.group().all_reduce(std::as_writable_bytes(std::span(sums)), Dtype::float64,
                              Reduction::sum, {.tag = "the epoch's losses"});
    timer_.mark(Phase::communication);
    summary.step = report.steps;
    summary.train_loss = sums[1] > 0 ? sums[0] / sums[1] : 0;
    summary.samples = samples_;
    const Clock::time_point trained = Clock::now();
    summary.seconds = seconds(trained - started);
    if (test_ != nullptr) {
      const Evaluation found = evaluate(world_, task_, *test_, options_.evaluation_batch_size);
      summary.evaluated = true;
      summary.test_loss = found.loss;
      summary.has_accuracy = static_cast<bool>(task_.correct);
      summary.test_accuracy = found.accuracy;
      summary.evaluation_seconds = seconds(Clock::now() - trained);
      timer_.mark(Phase::evaluation);
    }
    report.epochs.push_back(summary);
    if (world_.rank() == 0) world_.events().emit(epoch_event(summary));
    snapshots_.write(summary.epoch);
  }

  // This rank's loss, a sum, and its weight.
  std::pair<double, double> run_step(std::uint64_t epoch, const Ledger::Epoch& order,
                                     std::uint64_t of_epoch, std::int64_t step,
                                     EpochSummary& summary) {
    const PositionRange range = ledger_.positions(of_epoch, world_.rank());
    std::vector<std::uint64_t> indices;
    for (std::uint64_t position = range.begin; position < range.end; ++position)
      indices.push_back(order.index(position));
    at::manual_seed(mix({options_.seed, static_cast<std::uint64_t>(step),
                         static_cast<std::uint64_t>(world_.rank())}));
    const Batch batch = train_.training_batch(indices, epoch);
    timer_.mark(Phase::data);
    optimizer_->zero_grad();
    const LossValue loss = [&] {
      const Autocast autocast(options_.precision);
      return task_.loss(task_.forward(batch.input), batch.target);
    }();
    const double sum = loss.sum.item<double>();
    timer_.mark(Phase::forward);
    if (!std::isfinite(sum))
      throw Error(
          fmt::format("step {}: the loss on rank {} is not finite; hint: a smaller "
                      "optimizer.lr, or train.clip_grad_norm",
                      step + 1, world_.rank()));
    if (replica_) replica_->set_weight(loss.weight);
    (loss.sum / loss.weight).backward();
    if (options_.clip_grad_norm > 0)
      summary.gradient_norm = clip_grad_norm_(task_.module->parameters(), options_.clip_grad_norm);
    timer_.mark(Phase::backward);
    if (replica_) timer_.queue(replica_->communication());
    faults_.at(Point::computed, static_cast<std::uint64_t>(step) + 1);
    summary.lr = learning_rate(schedule_, step);
    for (auto& group : optimizer_->param_groups()) group.options().set_lr(summary.lr);
    optimizer_->step();
    timer_.mark(Phase::optimizer);
    if (local_ && local_->step()) timer_.mark(Phase::communication);
    return {sum, loss.weight};
  }

  // The loss is rank 0's own: the mean of all would be a meeting.
  void report_step(const EpochSummary& summary, std::int64_t step, double loss) {
    if (world_.rank() != 0) return;
    if (step == 1) world_.events().emit(first_step_event());
    const Clock::time_point now = Clock::now();
    if (now < next_progress_) return;
    next_progress_ = now + kProgressInterval;
    world_.events().emit(rank_event(world_, timer_));
    world_.events().emit({{"event", "step"},
                          {"epoch", summary.epoch},
                          {"step", step},
                          {"steps_per_epoch", steps_per_epoch_},
                          {"loss", loss},
                          {"grad_norm", summary.gradient_norm},
                          {"lr", summary.lr},
                          {"samples", samples_},
                          {"clock", monotonic_clock()}});
  }

  const World& world_;
  const TrainerOptions& options_;
  const Task& task_;
  const Schedule& schedule_;
  const BatchSource& train_;
  const BatchSource* test_;
  const Ledger ledger_;
  std::uint64_t steps_per_epoch_, samples_ = 0;
  const std::unique_ptr<torch::optim::Optimizer> optimizer_;
  std::optional<Replica> replica_;
  std::unique_ptr<LocalSteps> local_;
  PhaseTimer timer_;
  FaultInjector faults_;
  Snapshots snapshots_;
  Clock::time_point next_progress_{};
};

}  // namespace

FitReport fit_replicas(const World& world, const Job& job, const TrainerOptions& options,
                       const Task& task, const Schedule& schedule, const BatchSource& train,
                       const BatchSource* test) {
  if (options.resume)
    throw ConfigError(
        fmt::format("train.strategy = \"{}\" keeps no checkpoints", job.train.strategy),
        "train from the start, elsewhere");
  world.join();
  return ReplicaTraining(world, job, options, task, schedule, train, test).go();
}

}  // namespace lockstep
