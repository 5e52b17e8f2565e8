#include "lockstep/train/trainer.h"

#include <fmt/format.h>
#include <torch/nn/module.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/data/ledger.h"
#include "lockstep/observe/event.h"
#include "lockstep/train/events.h"
#include "lockstep/train/phases.h"
#include "lockstep/train/progress.h"
#include "lockstep/train/snapshot.h"
#include "lockstep/train/step.h"
#include "lockstep/train/training_checkpoints.h"

namespace lockstep {
namespace {

constexpr Clock::duration kProgressInterval = std::chrono::milliseconds(100);
constexpr const char* kByCallback = "a callback";

// One fit(): the state that its parts share.
class Run {
 public:
  Run(const World& world, const TrainerOptions& options, const Task& task,
      const OptimizerOptions& optimizer, const Schedule& schedule, const BatchSource& train,
      const BatchSource* test, const FoundCheckpoint& found);
  FitReport go();

 private:
  // Both say why training ends, "": it goes on. After run_steps() an epoch may be incomplete.
  std::string run_steps();
  std::string end_epoch();
  void run_step(const Ledger::Epoch& order, bool last);
  void evaluate_into(EpochSummary& summary);
  bool any_rank_stops(bool goes_on);
  void save_epoch(const std::string& reason);
  nlohmann::json ready() const;
  void report_step(const StepOutcome& result);
  void report_epoch();

  const World& world_;
  const TrainerOptions& options_;
  const Task& task_;
  const Schedule& schedule_;
  const BatchSource& train_;
  const BatchSource* test_;
  const FoundCheckpoint& found_;
  PhaseTimer timer_;
  SharedWeights weights_;
  Ledger ledger_;
  StepExecutor executor_;
  Snapshots snapshots_;
  CheckpointWriter checkpoints_;
  Progress progress_;
  bool stopped_ = false;    // by a callback
  bool first_step_ = true;  // of this process
  double lr_ = 0;           // of the last step
  double loss_ = 0;         // of the last step, its mean
  Clock::time_point next_progress_{};
};

std::vector<NamedTensor> snapshot_tensors(const SharedWeights& weights,
                                          const TrainerOptions& options) {
  std::vector<NamedTensor> tensors = weights.state();
  tensors.insert(tensors.end(), options.extra_tensors.begin(), options.extra_tensors.end());
  return tensors;
}

JobSettings settings(const TrainerOptions& options, const OptimizerOptions& optimizer,
                     const Schedule& schedule, const BatchSource& train, const BatchSource* test) {
  return settings_of(options, optimizer, schedule, train.size(),
                     test == nullptr ? 0 : test->size());
}

Run::Run(const World& world, const TrainerOptions& options, const Task& task,
         const OptimizerOptions& optimizer, const Schedule& schedule, const BatchSource& train,
         const BatchSource* test, const FoundCheckpoint& found)
    : world_(world),
      options_(options),
      task_(task),
      schedule_(schedule),
      train_(train),
      test_(test),
      found_(found),
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
      snapshots_(world, snapshot_tensors(weights_, options)),
      checkpoints_(world, options, settings(options, optimizer, schedule, train, test)) {
  if (found.path.empty()) return;
  restore(world, found, weights_);
  progress_ = found.progress;
}

FitReport Run::go() {
  world_.events().emit(ready());
  task_.module->train();
  std::string reason;
  if (progress_.step_of_epoch == 0 && !progress_.epochs.empty())
    reason = stop_reason(options_, progress_.epochs);  // resumed at its end
  if (!reason.empty()) snapshots_.write(static_cast<std::int64_t>(progress_.epochs.size()));
  try {
    while (reason.empty()) {
      reason = run_steps();
      if (reason.empty()) reason = end_epoch();
    }
  } catch (const CommError&) {
    throw;  // Others may have gone on or not: only whole epochs are known to be good.
  } catch (const Error&) {
    if (weights_.is_finite()) snapshots_.write(static_cast<std::int64_t>(progress_.epochs.size()));
    throw;
  }
  checkpoints_.finish();
  world_.events().emit(rank_event(world_, timer_));
  const auto epochs = static_cast<std::int64_t>(progress_.epochs.size());
  if (world_.rank() == 0) world_.events().emit(finished_event(reason, epochs, progress_.step));
  FitReport report{.epochs = progress_.epochs,
                   .steps = progress_.step,
                   .stopped_because = reason,
                   .resumed_step = found_.progress.step,
                   .broken_checkpoints = found_.broken,
                   .best_epoch = {}};
  if (const auto best = best_epoch(options_, progress_.epochs))
    report.best_epoch = progress_.epochs[*best].epoch;
  return report;
}

// The rest of the epoch under way.
std::string Run::run_steps() {
  const Ledger::Epoch order = ledger_.epoch(progress_.epochs.size());
  const std::uint64_t steps = ledger_.steps_per_epoch();
  while (progress_.step_of_epoch < steps) {
    if (options_.max_steps > 0 && progress_.step >= options_.max_steps) break;
    const bool last = progress_.step_of_epoch + 1 == steps ||
                      (options_.max_steps > 0 && progress_.step + 1 == options_.max_steps);
    run_step(order, last);
    const StepSummary summary{.epoch = static_cast<std::int64_t>(progress_.epochs.size()) + 1,
                              .step = progress_.step,
                              .loss = loss_,
                              .lr = lr_};
    const bool stops =
        options_.callbacks.on_step && any_rank_stops(options_.callbacks.on_step(summary));
    const std::int64_t every = options_.checkpoint_every_steps;
    // At the end of an epoch it is saved with the epoch.
    if (!last && (stops || (every > 0 && progress_.step % every == 0)))
      checkpoints_.save(weights_, progress_, /*always=*/true);
    stopped_ = stops;
    if (stops && !last) {
      snapshots_.write(static_cast<std::int64_t>(progress_.epochs.size()));
      return kByCallback;
    }
  }
  return "";
}

void Run::run_step(const Ledger::Epoch& order, bool last) {
  const Clock::time_point started = Clock::now();
  lr_ = learning_rate(schedule_, progress_.step);
  const StepOutcome result =
      executor_.run({.epoch = progress_.epochs.size(),
                     .of_epoch = progress_.step_of_epoch,
                     .number = progress_.step,
                     .lr = lr_,
                     // The norm costs a pass over the gradients: now and then.
                     .measure = last || progress_.step % 32 == 0},
                    order);
  progress_.samples += ledger_.batch_size(progress_.step_of_epoch);
  ++progress_.step;
  ++progress_.step_of_epoch;
  progress_.loss += result.loss_sum;
  progress_.weight += result.weight;
  progress_.gradient_norm = result.gradient_norm.value_or(progress_.gradient_norm);
  progress_.seconds += seconds(Clock::now() - started);
  loss_ = result.weight > 0 ? result.loss_sum / result.weight : 0.0;
  report_step(result);
}

std::string Run::end_epoch() {
  EpochSummary& summary = progress_.epochs.emplace_back();
  summary.epoch = static_cast<std::int64_t>(progress_.epochs.size());
  summary.step = progress_.step;
  summary.gradient_norm = progress_.gradient_norm;
  summary.train_loss = progress_.weight > 0 ? progress_.loss / progress_.weight : 0.0;
  summary.lr = lr_;
  summary.samples = progress_.samples;
  summary.seconds = progress_.seconds;
  if (test_ != nullptr) evaluate_into(summary);
  progress_.step_of_epoch = 0;
  progress_.loss = progress_.weight = progress_.seconds = 0;
  report_epoch();
  std::string reason = stop_reason(options_, progress_.epochs);
  if (options_.callbacks.on_epoch) stopped_ |= any_rank_stops(options_.callbacks.on_epoch(summary));
  if (stopped_ && reason.empty()) reason = kByCallback;
  if (weights_.is_finite()) {  // else the next step says so, and ends
    snapshots_.write(summary.epoch);
    save_epoch(reason);
  }
  return reason;
}

void Run::evaluate_into(EpochSummary& summary) {
  const Clock::time_point started = Clock::now();
  const Evaluation evaluation = evaluate(world_, task_, *test_, options_.evaluation_batch_size);
  summary.evaluated = true;
  summary.test_loss = evaluation.loss;
  summary.has_accuracy = static_cast<bool>(task_.correct);
  summary.test_accuracy = evaluation.accuracy;
  summary.evaluation_seconds = seconds(Clock::now() - started);
  timer_.mark(Phase::evaluation);
}

// Collective.
bool Run::any_rank_stops(bool goes_on) {
  std::int32_t stops = goes_on ? 0 : 1;
  world_.group().all_reduce(std::as_writable_bytes(std::span(&stops, 1)), Dtype::int32,
                            Reduction::max, {.tag = "whether a callback stops"});
  return stops != 0;
}

// After an epoch. Where checkpoints are wanted at all: the end and the best one, too. Epochs that
// are over before the checkpoint of the one before is written need none of their own.
void Run::save_epoch(const std::string& reason) {
  const std::int64_t epochs = options_.checkpoint_every_epochs;
  const std::int64_t steps = options_.checkpoint_every_steps;
  const EpochSummary& last = progress_.epochs.back();
  const bool always = !reason.empty() || (steps > 0 && last.step % steps == 0) ||
                      best_epoch(options_, progress_.epochs) == progress_.epochs.size() - 1;
  if (always || (epochs > 0 && last.epoch % epochs == 0))
    checkpoints_.save(weights_, progress_, always);
}

nlohmann::json Run::ready() const {
  nlohmann::json event =
      ready_event(world_, train_.size(), test_ == nullptr ? 0 : test_->size(),
                  weights_.parameter_count(), ledger_.steps_per_epoch(), options_.epochs);
  if (world_.rank() == 0 && !found_.path.empty()) event["resumed"] = to_json(progress_);
  return event;
}

void Run::report_step(const StepOutcome& result) {
  if (world_.rank() != 0) return;
  if (std::exchange(first_step_, false)) world_.events().emit(first_step_event());
  const Clock::time_point now = Clock::now();
  if (now < next_progress_) return;
  next_progress_ = now + kProgressInterval;
  world_.events().emit({{"event", "step"},
                        {"epoch", progress_.epochs.size() + 1},
                        {"step", progress_.step},
                        {"steps_per_epoch", ledger_.steps_per_epoch()},
                        {"loss", result.loss_sum / result.weight},
                        {"grad_norm", progress_.gradient_norm},
                        {"lr", lr_},
                        {"samples", progress_.samples},
                        {"clock", monotonic_clock()}});
}

void Run::report_epoch() {
  if (world_.rank() != 0) return;
  const EpochSummary& summary = progress_.epochs.back();
  world_.events().emit(epoch_event(summary));
  if (options_.print_test_loss && summary.evaluated)
    world_.events().emit(
        {{"event", "message"},
         {"text", fmt::format("Epoch {}, Test Loss: {:.4f}", summary.epoch, summary.test_loss)}});
}

void check(const World& world, const TrainerOptions& options, const Task& task,
           std::uint64_t samples, const BatchSource* test) {
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
  if (options.patience > 0 && test == nullptr)
    throw ConfigError("train.patience needs a test set",
                      "split.test = 0.1 holds a tenth of the rows out");
  if (options.monitor == Monitor::test_accuracy && test != nullptr && !task.correct)
    throw ConfigError("train.monitor = \"test_accuracy\": this loss knows no accuracy",
                      "train.monitor = \"test_loss\"");
}

// What becomes of a folder with checkpoints, or without: said to the agent, else on stderr.
void tell(const World& world, const FoundCheckpoint& found, bool resume) {
  if (world.rank() != 0) return;
  std::vector<std::string> lines;
  for (const std::string& broken : found.broken) lines.push_back("skipped: " + broken);
  const std::size_t epochs = found.progress.epochs.size();
  if (!found.path.empty())
    lines.push_back(fmt::format("going on from step {}, {}: {}", found.progress.step,
                                found.progress.step_of_epoch == 0
                                    ? fmt::format("after epoch {}", epochs)
                                    : fmt::format("in epoch {}", epochs + 1),
                                found.path));
  else if (resume)
    lines.emplace_back("there is no whole checkpoint: training starts from the beginning");
  for (const std::string& line : lines)
    if (world.has_agent())
      world.events().emit({{"event", "message"}, {"text", line}});
    else
      std::fprintf(stderr, "lockstep: %s\n", line.c_str());
}

FoundCheckpoint find(const World& world, const TrainerOptions& options) {
  if (options.checkpoint_dir.empty()) {
    if (options.resume)
      throw ConfigError("nothing to resume: no checkpoint_dir", "name the folder of the run");
    return {};
  }
  FoundCheckpoint found = find_checkpoint(world, options.checkpoint_dir);
  if (!options.resume && !found.path.empty())
    throw ConfigError(fmt::format("{}: a checkpoint of an earlier run", found.path),
                      "resume it, or name another folder");
  tell(world, found, options.resume);
  return found;
}

}  // namespace

Trainer::Trainer(World world, TrainerOptions options)
    : world_(std::move(world)), options_(std::move(options)) {}

FitReport Trainer::fit(const Task& task, const OptimizerOptions& optimizer,
                       const Schedule& schedule, const BatchSource& train,
                       const BatchSource* test) {
  TrainerOptions options = options_;
  const FoundCheckpoint found = find(world_, options);
  if (options.virtual_ranks == 0) {
    options.virtual_ranks = world_.size();
    for (const auto& [name, value] : found.job)
      if (name == "virtual_ranks") options.virtual_ranks = std::stoi(value);
  }
  check(world_, options, task, train.size(), test);
  if (!found.path.empty())
    if (const std::string difference =
            first_difference(settings(options, optimizer, schedule, train, test), found.job);
        !difference.empty())
      throw ConfigError(fmt::format("{} is of another job: {}", found.path, difference),
                        "resume with the settings that the run was started with, or train from "
                        "the start elsewhere");
  return Run(world_, options, task, optimizer, schedule, train, test, found).go();
}

}  // namespace lockstep
