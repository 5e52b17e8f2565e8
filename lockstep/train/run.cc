#include "lockstep/train/run.h"

#include <fmt/format.h>
#include <torch/nn/module.h>

#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/observe/event.h"
#include "lockstep/parallel/text_of_rank_0.h"
#include "lockstep/train/events.h"
#include "lockstep/train/kept_progress.h"
#include "lockstep/train/progress.h"

namespace lockstep {
namespace {

constexpr Clock::duration kProgressInterval = std::chrono::milliseconds(100);
constexpr const char* kByCallback = "a callback";

std::vector<NamedTensor> snapshot_tensors(const SharedWeights& weights,
                                          const TrainerOptions& options) {
  std::vector<NamedTensor> tensors = weights.state();
  tensors.insert(tensors.end(), options.extra_tensors.begin(), options.extra_tensors.end());
  return tensors;
}

SharedWeights make_weights(const World& world, const TrainerOptions& options, const Task& task,
                           const OptimizerOptions& optimizer, const FoundCheckpoint& found,
                           int kept) {
  std::int64_t epochs = options.epochs;
  if (options.max_steps > 0) epochs = std::min(epochs, options.max_steps);
  epochs = std::max(epochs, static_cast<std::int64_t>(found.progress.epochs.size()));
  const InitialState initial = initial_state(found);
  return SharedWeights(*task.module, world, optimizer,
                       {.virtual_ranks = options.virtual_ranks,
                        .clip_grad_norm = options.clip_grad_norm,
                        .wire_format = options.wire_format,
                        .note_bytes = sizeof(StepNote),
                        .log_bytes = epoch_log_bytes(epochs),
                        .kept = kept},
                       found.path.empty() ? nullptr : &initial);
}

// Nodes' logs may differ by an epoch whose end not all of them had written down: rank 0's counts.
Progress kept_progress(const World& world, const SharedWeights& weights) {
  if (world.local_sizes().size() == 1) return progress_from(weights.note(), weights.log());
  std::string log = text_of_rank_0(world, [&] {
    return std::string(reinterpret_cast<const char*>(weights.log().data()), weights.log().size());
  });
  Progress progress = progress_from(weights.note(), std::as_writable_bytes(std::span(log)));
  if (world.local_rank() == 0) write_log(weights.log(), progress.epochs);
  return progress;
}

TrainerOptions with_virtual_ranks(TrainerOptions options, int virtual_ranks) {
  options.virtual_ranks = virtual_ranks;
  return options;
}

}  // namespace

JobSettings settings_of(const TrainerOptions& options, const OptimizerOptions& optimizer,
                        const Schedule& schedule, const BatchSource& train,
                        const BatchSource* test) {
  return settings_of(options, optimizer, schedule, train.size(),
                     test == nullptr ? 0 : test->size());
}

Run::Run(const World& world, const TrainerOptions& options, const Task& task,
         const OptimizerOptions& optimizer, const Schedule& schedule, const BatchSource& train,
         const BatchSource* test, const FoundCheckpoint& found, Session& session)
    : world_(world),
      task_(task),
      schedule_(schedule),
      train_(train),
      test_(test),
      found_(found),
      session_(session),
      weights_(make_weights(world, options, task, optimizer, found, session.kept)),
      options_(with_virtual_ranks(options, weights_.virtual_ranks())),
      ledger_({.samples = train.size(),
               .global_batch_size = static_cast<std::uint64_t>(options.global_batch_size),
               .virtual_ranks = options_.virtual_ranks,
               .seed = options.seed,
               .shuffle = options.shuffle,
               .partition = options.partition}),
      executor_(task, weights_, train, ledger_, options_, session.timer),
      snapshots_(world, snapshot_tensors(weights_, options)),
      progress_(kept_progress(world, weights_)) {
  if (progress_.step > 0) lr_ = learning_rate(schedule_, progress_.step - 1);
  if (!session.checkpoints)
    session.checkpoints.emplace(world, options_,
                                settings_of(options_, optimizer, schedule, train, test));
  if (world.generation() > 0) take_up();
}

// In a later generation: what it begins with, and what of the last one's is done again.
void Run::take_up() {
  std::int32_t flags[2] = {session_.in_step && !weights_.origin().finished_step ? 1 : 0,
                           session_.stopped ? 1 : 0};
  session_.in_step = false;
  world_.group().all_reduce(std::as_writable_bytes(std::span(flags)), Dtype::int32, Reduction::max,
                            {.tag = "what is done again"});
  if (world_.rank() == 0)
    world_.events().emit({{"event", "entered"}, {"generation", world_.generation()}});
  session_.stopped = flags[1] != 0;
  recovered_ = {{"event", "recovered"},
                {"generation", world_.generation()},
                {"steps_redone", flags[0]},
                {"source", weights_.origin().from_peer ? "peer"
                           : weights_.origin().found   ? "segment"
                           : found_.path.empty()       ? "start"
                                                       : "checkpoint"},
                {"reason", weights_.origin().reason}};
}

std::optional<FitReport> Run::go() {
  if (world_.rank() == 0) {
    world_.events().emit(ready());
    if (options_.wire_format != WireFormat::fp32 && world_.generation() == 0)
      world_.events().emit(
          {{"event", "message"},
           {"text", fmt::format("gradients travel between nodes as {}: what a run comes to depends "
                                "on its nodes, and one that is resumed has bits of its own",
                                name_of(options_.wire_format))}});
  }
  task_.module->train();
  std::string reason;
  if (progress_.step_of_epoch == 0 && !progress_.epochs.empty())
    reason = stop_reason(options_, progress_.epochs);  // taken up at its end
  const bool ends_epoch = progress_.step_of_epoch == ledger_.steps_per_epoch() ||
                          (progress_.step_of_epoch > 0 && options_.max_steps > 0 &&
                           progress_.step >= options_.max_steps);
  if (reason.empty() && session_.stopped && !ends_epoch) reason = kByCallback;
  if (!reason.empty()) {  // whoever was to save it may have died
    write_snapshot();
    if (weights_.origin().found) session_.checkpoints->save(weights_, progress_, /*always=*/true);
  }
  try {
    while (reason.empty()) {
      reason = run_steps();
      if (next_generation_) return std::nullopt;
      if (reason.empty()) reason = end_epoch();
    }
  } catch (const CommError&) {
    throw;  // Others may have gone on or not: only whole epochs are known to be good.
  } catch (const Error&) {
    if (weights_.is_finite()) write_snapshot();
    throw;
  }
  session_.checkpoints->finish();
  world_.events().emit(rank_event(world_, session_.timer));
  const auto epochs = static_cast<std::int64_t>(progress_.epochs.size());
  if (world_.rank() == 0) {
    tell_recovered();  // there was no step left
    nlohmann::json event = finished_event(reason, epochs, progress_.step);
    if (preempted_) event["preempted"] = true;
    world_.events().emit(event);
  }
  // Nobody goes who may have to take another's part.
  if (world_.is_elastic()) world_.group().barrier({.tag = "the end"});
  FitReport report{.epochs = progress_.epochs,
                   .steps = progress_.step,
                   .stopped_because = reason,
                   .resumed_step = found_.progress.step,
                   .broken_checkpoints = found_.broken,
                   .best_epoch = {},
                   .preempted = preempted_};
  if (const auto best = best_epoch(options_, progress_.epochs))
    report.best_epoch = progress_.epochs[*best].epoch;
  return report;
}

void Run::write_snapshot() { snapshots_.write(static_cast<std::int64_t>(progress_.epochs.size())); }

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
    if (!last && (stops || preempted_ || (every > 0 && progress_.step % every == 0)))
      session_.checkpoints->save(weights_, progress_, /*always=*/true);
    if (last || next_generation_) break;  // which knows that a callback stops
    if (stops || preempted_) {
      write_snapshot();
      return preempted_ ? kAskedToStop : kByCallback;
    }
  }
  return "";
}

void Run::run_step(const Ledger::Epoch& order, bool last) {
  const Clock::time_point started = Clock::now();
  lr_ = learning_rate(schedule_, progress_.step);
  session_.in_step = true;
  const StepOutcome result =
      executor_.decide({.epoch = progress_.epochs.size(),
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
  const StepNote note = note_of(progress_);
  executor_.update(std::as_bytes(std::span(&note, 1)));
  session_.in_step = false;
  next_generation_ = result.next_generation;
  preempted_ = result.stop;
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
  if (options_.callbacks.on_epoch) {
    // Where an epoch's end is done again, the callback is not.
    const bool again = std::exchange(session_.epochs_called_back, summary.epoch) == summary.epoch;
    any_rank_stops(again || options_.callbacks.on_epoch(summary));
  }
  if (session_.stopped && reason.empty()) reason = kByCallback;
  if (preempted_ && reason.empty()) reason = kAskedToStop;
  preempted_ = reason == kAskedToStop;
  if (weights_.is_finite()) {  // else the next step says so, and ends
    write_snapshot();
    save_epoch(reason);
  }
  if (world_.local_rank() == 0) write_log(weights_.log(), progress_.epochs);
  return reason;
}

void Run::evaluate_into(EpochSummary& summary) {
  const Clock::time_point started = Clock::now();
  session_.faults.at(Point::evaluating, static_cast<std::uint64_t>(progress_.step));
  const Evaluation evaluation = evaluate(world_, task_, *test_, options_.evaluation_batch_size);
  summary.evaluated = true;
  summary.test_loss = evaluation.loss;
  summary.has_accuracy = static_cast<bool>(task_.correct);
  summary.test_accuracy = evaluation.accuracy;
  summary.evaluation_seconds = seconds(Clock::now() - started);
  session_.timer.mark(Phase::evaluation);
}

// Collective.
bool Run::any_rank_stops(bool goes_on) {
  session_.stopped |= !goes_on;  // also if the generation ends before the others know
  std::int32_t stops = session_.stopped ? 1 : 0;
  world_.group().all_reduce(std::as_writable_bytes(std::span(&stops, 1)), Dtype::int32,
                            Reduction::max, {.tag = "whether a callback stops"});
  return session_.stopped = stops != 0;
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
    session_.checkpoints->save(weights_, progress_, always);
}

nlohmann::json Run::ready() const {
  nlohmann::json event =
      ready_event(world_, train_.size(), test_ == nullptr ? 0 : test_->size(),
                  weights_.parameter_count(), ledger_.steps_per_epoch(), options_.epochs);
  if (!found_.path.empty() || weights_.origin().found) event["resumed"] = to_json(progress_);
  return event;
}

void Run::tell_recovered() {
  if (recovered_.is_null()) return;
  recovered_["step"] = progress_.step;
  recovered_["clock"] = monotonic_clock();
  world_.events().emit(std::exchange(recovered_, nullptr));
}

void Run::report_step(const StepOutcome& result) {
  const Clock::time_point now = Clock::now();
  if (now >= next_times_) {
    next_times_ = now + kTimesInterval;
    world_.events().emit(rank_event(world_, session_.timer));
  }
  if (world_.rank() != 0) return;
  if (std::exchange(session_.first_step, false)) world_.events().emit(first_step_event());
  tell_recovered();
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

}  // namespace lockstep
