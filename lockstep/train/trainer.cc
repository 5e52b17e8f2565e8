#include "lockstep/train/trainer.h"

#include <fmt/format.h>
#include <torch/nn/module.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/data/ledger.h"
#include "lockstep/observe/event.h"
#include "lockstep/train/events.h"
#include "lockstep/train/phases.h"
#include "lockstep/train/snapshot.h"
#include "lockstep/train/step.h"

namespace lockstep {
namespace {

constexpr Clock::duration kProgressInterval = std::chrono::milliseconds(100);

// Why training ends after this epoch, or "" to go on. Pure.
std::string stop_reason(const TrainerOptions& options, const std::vector<EpochSummary>& epochs) {
  const EpochSummary& last = epochs.back();
  if (options.max_steps > 0 && last.step >= options.max_steps)
    return fmt::format("train.max_steps = {}", options.max_steps);
  if (options.tolerance > 0 && epochs.size() >= 2) {
    const EpochSummary& before = epochs[epochs.size() - 2];
    const double change = options.tolerance_of_gradient_norm
                              ? std::abs(last.gradient_norm - before.gradient_norm)
                              : std::abs(last.train_loss - before.train_loss);
    if (change < options.tolerance)
      return fmt::format("the {} changed by {:.3g} in epoch {}, less than train.tolerance = {:g}",
                         options.tolerance_of_gradient_norm ? "gradient norm" : "loss", change,
                         last.epoch, options.tolerance);
  }
  if (last.epoch >= options.epochs)
    return fmt::format("{} epoch{}", options.epochs, options.epochs == 1 ? "" : "s");
  return "";
}

// One fit(): the state that its parts share.
class Run {
 public:
  Run(const World& world, const TrainerOptions& options, const Task& task,
      const OptimizerOptions& optimizer, const Schedule& schedule, const BatchSource& train,
      const BatchSource* test);
  std::vector<EpochSummary> go();

 private:
  EpochSummary run_epoch(std::int64_t epoch);
  void report_step(std::int64_t epoch, const StepOutcome& result, double lr);
  void report_epoch(const EpochSummary& summary, double train_seconds, double evaluation_seconds);

  const World& world_;
  const TrainerOptions& options_;
  const Task& task_;
  const Schedule& schedule_;
  const BatchSource& train_;
  const BatchSource* test_;
  PhaseTimer timer_;
  SharedWeights weights_;
  Ledger ledger_;
  StepExecutor executor_;
  Snapshots snapshots_;
  std::int64_t step_ = 0;      // committed steps
  std::uint64_t samples_ = 0;  // of them
  double lr_ = 0;              // of the last step
  double gradient_norm_ = 0;   // of the last step that measured it
  Clock::time_point next_progress_{};
};

std::vector<NamedTensor> snapshot_tensors(const SharedWeights& weights,
                                          const TrainerOptions& options) {
  std::vector<NamedTensor> tensors = weights.state();
  tensors.insert(tensors.end(), options.extra_tensors.begin(), options.extra_tensors.end());
  return tensors;
}

Run::Run(const World& world, const TrainerOptions& options, const Task& task,
         const OptimizerOptions& optimizer, const Schedule& schedule, const BatchSource& train,
         const BatchSource* test)
    : world_(world),
      options_(options),
      task_(task),
      schedule_(schedule),
      train_(train),
      test_(test),
      timer_(world.group()),
      weights_(*task.module, world, optimizer,
               {.virtual_ranks = options.virtual_ranks, .clip_grad_norm = options.clip_grad_norm}),
      ledger_({.samples = train.size(),
               .global_batch_size = static_cast<std::uint64_t>(options.global_batch_size),
               .virtual_ranks = options.virtual_ranks,
               .seed = options.seed,
               .shuffle = options.shuffle,
               .partition = options.partition}),
      executor_(task, weights_, train, ledger_, options, timer_),
      snapshots_(world, snapshot_tensors(weights_, options)) {}

std::vector<EpochSummary> Run::go() {
  world_.events().emit(ready_event(world_, train_.size(), test_ == nullptr ? 0 : test_->size(),
                                   weights_.parameter_count(), ledger_.steps_per_epoch(),
                                   options_.epochs));
  task_.module->train();
  std::vector<EpochSummary> epochs;
  std::string reason;
  try {
    while (reason.empty()) {
      epochs.push_back(run_epoch(static_cast<std::int64_t>(epochs.size()) + 1));
      reason = stop_reason(options_, epochs);
    }
  } catch (const CommError&) {
    throw;  // Others may have gone on or not: only whole epochs are known to be good.
  } catch (const Error&) {
    if (weights_.is_finite()) snapshots_.write(static_cast<std::int64_t>(epochs.size()));
    throw;
  }
  world_.events().emit(rank_event(world_, timer_));
  if (world_.rank() == 0)
    world_.events().emit(finished_event(reason, static_cast<std::int64_t>(epochs.size()), step_));
  return epochs;
}

EpochSummary Run::run_epoch(std::int64_t epoch) {
  const Clock::time_point started = Clock::now();
  const Ledger::Epoch order = ledger_.epoch(static_cast<std::uint64_t>(epoch - 1));
  EpochSummary summary{.epoch = epoch};
  double loss = 0, weight = 0;
  for (std::uint64_t s = 0; s < ledger_.steps_per_epoch(); ++s) {
    if (options_.max_steps > 0 && step_ >= options_.max_steps) break;
    lr_ = learning_rate(schedule_, step_);
    // The norm costs a pass over the gradients: now and then.
    const bool last = s + 1 == ledger_.steps_per_epoch() ||
                      (options_.max_steps > 0 && step_ + 1 == options_.max_steps);
    const StepOutcome result = executor_.run(order, s, step_, lr_, last || step_ % 32 == 0);
    ++step_;
    samples_ += ledger_.batch_size(s);
    loss += result.loss_sum;
    weight += result.weight;
    gradient_norm_ = result.gradient_norm.value_or(gradient_norm_);
    report_step(epoch, result, lr_);
  }
  summary.step = step_;
  summary.gradient_norm = gradient_norm_;
  summary.train_loss = weight > 0 ? loss / weight : 0.0;
  const Clock::time_point trained = Clock::now();
  if (test_ != nullptr) {
    const Evaluation evaluation = evaluate(world_, task_, *test_, options_.evaluation_batch_size);
    summary.evaluated = true;
    summary.test_loss = evaluation.loss;
    summary.has_accuracy = static_cast<bool>(task_.correct);
    summary.test_accuracy = evaluation.accuracy;
    timer_.mark(Phase::evaluation);
  }
  if (world_.rank() == 0)
    report_epoch(summary, seconds(trained - started), seconds(Clock::now() - trained));
  if (weights_.is_finite()) snapshots_.write(epoch);  // else the next step says so, and ends
  return summary;
}

void Run::report_step(std::int64_t epoch, const StepOutcome& result, double lr) {
  if (world_.rank() != 0) return;
  if (step_ == 1) world_.events().emit(first_step_event());
  const Clock::time_point now = Clock::now();
  if (now < next_progress_) return;
  next_progress_ = now + kProgressInterval;
  world_.events().emit({{"event", "step"},
                        {"epoch", epoch},
                        {"step", step_},
                        {"steps_per_epoch", ledger_.steps_per_epoch()},
                        {"loss", result.loss_sum / result.weight},
                        {"grad_norm", gradient_norm_},
                        {"lr", lr},
                        {"samples", samples_},
                        {"clock", monotonic_clock()}});
}

void Run::report_epoch(const EpochSummary& summary, double train_seconds,
                       double evaluation_seconds) {
  world_.events().emit(epoch_event(summary, lr_, samples_, train_seconds, evaluation_seconds));
  if (options_.print_test_loss && summary.evaluated)
    world_.events().emit(
        {{"event", "message"},
         {"text", fmt::format("Epoch {}, Test Loss: {:.4f}", summary.epoch, summary.test_loss)}});
}

void check(const World& world, const TrainerOptions& options, std::uint64_t samples) {
  if (samples == 0) throw ConfigError("the training set is empty");
  if (options.virtual_ranks < world.size())
    throw ConfigError(fmt::format("{} workers, but train.virtual_ranks is {}: a worker would have "
                                  "nothing to do",
                                  world.size(), options.virtual_ranks),
                      fmt::format("--workers {} or fewer", options.virtual_ranks));
  if (samples < static_cast<std::uint64_t>(options.virtual_ranks))
    throw ConfigError(
        fmt::format("{} workers (train.virtual_ranks = {}) for {} training samples: more workers "
                    "than samples",
                    world.size(), options.virtual_ranks, samples),
        fmt::format("--workers {} or fewer", samples));
}

}  // namespace

Trainer::Trainer(World world, TrainerOptions options)
    : world_(std::move(world)), options_(std::move(options)) {}

std::vector<EpochSummary> Trainer::fit(const Task& task, const OptimizerOptions& optimizer,
                                       const Schedule& schedule, const BatchSource& train,
                                       const BatchSource* test) {
  check(world_, options_, train.size());
  return Run(world_, options_, task, optimizer, schedule, train, test).go();
}

}  // namespace lockstep
