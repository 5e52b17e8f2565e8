#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "lockstep/base/error.h"
#include "lockstep/data/ledger.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/observe/event.h"
#include "lockstep/recipes/linear_regression.h"
#include "lockstep/recipes/loss.h"
#include "lockstep/recipes/model.h"
#include "lockstep/recipes/optimizer.h"
#include "lockstep/recipes/recipe.h"
#include "lockstep/recipes/replica_training.h"
#include "lockstep/recipes/saved_model.h"
#include "lockstep/recipes/text.h"
#include "lockstep/train/events.h"
#include "lockstep/train/snapshot.h"
#include "lockstep/train/trainer.h"

namespace lockstep {
namespace {

Schedule schedule_for(const Job& job, std::int64_t steps_per_epoch) {
  Schedule schedule{.lr = job.optimizer.lr,
                    .min_lr = job.schedule.min_lr,
                    .warmup_steps = job.schedule.warmup_steps,
                    .total_steps = job.train.epochs * steps_per_epoch,
                    .step_size = job.schedule.step_epochs * steps_per_epoch,
                    .gamma = job.schedule.gamma};
  if (job.train.max_steps > 0)
    schedule.total_steps = std::min(schedule.total_steps, job.train.max_steps);
  if (job.schedule.name == "linear") schedule.kind = Schedule::Kind::linear;
  if (job.schedule.name == "cosine") schedule.kind = Schedule::Kind::cosine;
  if (job.schedule.name == "step") schedule.kind = Schedule::Kind::step;
  return schedule;
}

WireFormat wire_format_of(const std::string& name) {
  for (const WireFormat format : {WireFormat::bf16, WireFormat::int8})
    if (name == name_of(format)) return format;
  return WireFormat::fp32;
}

TrainerOptions trainer_options(const Job& job, std::vector<NamedTensor> extra_tensors,
                               const CheckpointPlace& checkpoints) {
  return {
      .epochs = job.train.epochs,
      .max_steps = job.train.max_steps,
      .global_batch_size = job.train.global_batch_size,
      .virtual_ranks = static_cast<int>(job.train.virtual_ranks),
      .accumulate = job.train.accumulate,
      .seed = job.train.seed,
      .shuffle = job.train.shuffle,
      .clip_grad_norm = job.train.clip_grad_norm,
      .precision = job.train.precision == "bf16" ? Precision::bf16 : Precision::fp32,
      .wire_format = wire_format_of(job.train.wire_format),
      .tolerance = job.train.tolerance,
      .tolerance_of_gradient_norm = job.train.tolerance_of == "gradient_norm",
      .patience = job.train.patience,
      .min_delta = job.train.min_delta,
      .monitor = job.train.monitor == "test_accuracy" ? Monitor::test_accuracy : Monitor::test_loss,
      .print_test_loss = job.train.print_test_loss,
      .checkpoint_dir = checkpoints.folder,
      .checkpoint_every_epochs = job.checkpoint.every_epochs,
      .checkpoint_every_steps = job.checkpoint.every_steps,
      .checkpoint_keep = static_cast<int>(job.checkpoint.keep),
      .resume = checkpoints.resume,
      .job = result_settings(job),
      .extra_tensors = std::move(extra_tensors)};
}

// The trained linear model's weights in the data's own units: undoes the normalisation of the
// features.
LinearSolution solution_of(const torch::nn::Module& module, const Normalization& normalization) {
  LinearSolution solution;
  const auto parameters = module.named_parameters();
  const at::Tensor weight = parameters["layer1.weight"].detach().reshape(-1);
  if (const at::Tensor* bias = parameters.find("layer1.bias")) solution.bias = bias->item<double>();
  for (std::int64_t i = 0; i < weight.numel(); ++i) {
    const auto at = normalization.mean.size() == 1 ? 0 : static_cast<std::size_t>(i);
    const double scaled = weight.const_data_ptr<float>()[i] / double{normalization.deviation[at]};
    solution.weights.push_back(scaled);
    solution.bias -= scaled * normalization.mean[at];
  }
  return solution;
}

// How near a linear model came to the weights that its data was made from.
void report_distance(const World& world, const RecipeData& data, const LinearSolution& found) {
  if (world.rank() != 0 || found.weights.size() != data.known_weights.size()) return;
  double largest = std::abs(found.bias - data.known_bias);
  for (std::size_t i = 0; i < found.weights.size(); ++i)
    largest = std::max(largest, std::abs(found.weights[i] - double{data.known_weights[i]}));
  world.events().emit(
      {{"event", "message"},
       {"text", fmt::format("known weights found to within {:.2g} ({} weights and the bias)",
                            largest, found.weights.size())}});
  world.events().emit({{"event", "solution"},
                       {"values",
                        {{"weights", found.weights},
                         {"bias", found.bias},
                         {"largest_distance_from_known", largest}}}});
}

// What fit() does, for the closed form: one "epoch", one "step".
void fit_closed_form(const World& world, const Job& job, const Dataset& train_rows,
                     const Task& task, const BatchSource& train, const BatchSource* test,
                     const std::vector<NamedTensor>& extra_tensors) {
  const Clock::time_point started = Clock::now();
  const TrainerOptions options = trainer_options(job, {}, {});
  world.join();
  PhaseTimer timer(world);
  std::vector<NamedTensor> tensors = named_parameters(*task.module);
  const auto count = [&] {
    std::size_t sum = 0;
    for (const NamedTensor& one : tensors) sum += static_cast<std::size_t>(one.tensor.numel());
    return sum;
  }();
  tensors.insert(tensors.end(), extra_tensors.begin(), extra_tensors.end());
  Snapshots snapshots(world, tensors);
  if (world.rank() == 0)
    world.events().emit(
        ready_event(world, train.size(), test == nullptr ? 0 : test->size(), count, 1, 1));
  const LinearSolution solution = solve_normal_equations(world, train_rows, options.virtual_ranks);
  for (const NamedTensor& named : named_parameters(*task.module)) {
    float* out = named.tensor.mutable_data_ptr<float>();
    if (named.name == "layer1.bias")
      *out = static_cast<float>(solution.bias);
    else
      for (double weight : solution.weights) *out++ = static_cast<float>(weight);
  }
  timer.mark(Phase::optimizer);
  if (world.rank() == 0) world.events().emit(first_step_event());
  const Clock::time_point solved = Clock::now();
  EpochSummary summary{.epoch = 1, .step = 1};
  summary.train_loss = evaluate(world, task, train, options.evaluation_batch_size).loss;
  if (test != nullptr) {
    summary.evaluated = true;
    summary.test_loss = evaluate(world, task, *test, options.evaluation_batch_size).loss;
  }
  timer.mark(Phase::evaluation);
  summary.samples = train.size();
  summary.seconds = seconds(solved - started);
  summary.evaluation_seconds = seconds(Clock::now() - solved);
  if (world.rank() == 0) world.events().emit(epoch_event(summary));
  snapshots.write(1);
  world.events().emit(rank_event(world, timer));
  if (world.rank() == 0) world.events().emit(finished_event("solved in closed form", 1, 1));
}

// Of each class, the part of its test rows that is predicted right: what shows whether a rare class
// has been learned. A class without test rows has none.
void report_recall(const World& world, const Task& task, const BatchSource& test,
                   const Dataset& rows) {
  constexpr std::uint64_t kBatch = 500;
  const at::NoGradGuard no_grad;
  task.module->eval();
  const auto classes = static_cast<std::size_t>(rows.class_count);
  std::vector<std::vector<std::uint64_t>> of_class(classes);
  for (std::uint64_t row = 0; row < rows.rows; ++row)
    of_class[static_cast<std::size_t>(rows.classes[row])].push_back(row);
  std::vector<double> right(classes);
  for (std::size_t c = 0; c < classes; ++c) {
    const PositionRange mine =
        even_part(of_class[c].size(), static_cast<std::uint64_t>(world.size()),
                  static_cast<std::uint64_t>(world.rank()));
    for (std::uint64_t first = mine.begin; first < mine.end; first += kBatch) {
      const Batch batch =
          test.batch(std::span(of_class[c]).subspan(first, std::min(kBatch, mine.end - first)));
      right[c] += static_cast<double>(task.correct(task.forward(batch.input), batch.target));
    }
  }
  world.group().all_reduce(std::as_writable_bytes(std::span(right)), Dtype::float64, Reduction::sum,
                           {.tag = "recall"});
  if (world.rank() != 0) return;
  std::string text = "recall by class:";
  nlohmann::json recall = nlohmann::json::array();
  for (std::size_t c = 0; c < classes; ++c) {
    recall.push_back(of_class[c].empty()
                         ? nlohmann::json()
                         : nlohmann::json(right[c] / static_cast<double>(of_class[c].size())));
    text += recall.back().is_null() ? " -" : fmt::format(" {:.3f}", recall.back().get<double>());
  }
  world.events().emit({{"event", "message"}, {"text", text}});
  world.events().emit({{"event", "solution"}, {"values", {{"recall", std::move(recall)}}}});
}

FitReport fit(const World& world, const Job& job, const RecipeData& data, TrainerOptions options,
              const Task& task, const BatchSource& train, const BatchSource* test) {
  options.partition = data.partition;
  const auto batch = static_cast<std::uint64_t>(job.train.global_batch_size);
  const auto steps_per_epoch = static_cast<std::int64_t>((train.size() + batch - 1) / batch);
  const Schedule schedule = schedule_for(job, steps_per_epoch);
  if (job.train.strategy != "shared_weights")
    return fit_replicas(world, job, options, task, schedule, train, test);
  return Trainer(world, std::move(options))
      .fit(task, optimizer_options(job.optimizer), schedule, train, test);
}

void train_text(const World& world, const Job& job, const RecipeData& data,
                const CheckpointPlace& checkpoints) {
  constexpr std::int64_t kEvaluatedBlocks = 32;  // at once: the outputs are large
  const Model model =
      make_model(job.model, data.sets.train.sample_shape, kByteValues, job.train.seed);
  const Task task{model.module, model.forward, text_loss, {}};
  const TextBatches train(data.sets.train), held_out(data.sets.test);
  TrainerOptions options = trainer_options(job, {}, checkpoints);
  options.evaluation_batch_size = kEvaluatedBlocks;
  const FitReport report =
      fit(world, job, data, options, task, train, held_out.size() > 0 ? &held_out : nullptr);
  if (!report.is_member || world.rank() != 0 || !report.epochs.back().evaluated) return;
  const double nats = report.epochs.back().test_loss;
  world.events().emit(
      {{"event", "message"},
       {"text", fmt::format("held-out text: {:.4f} nats per byte, perplexity {:.3f}", nats,
                            std::exp(nats))}});
  world.events().emit({{"event", "solution"},
                       {"values", {{"nats_per_byte", nats}, {"perplexity", std::exp(nats)}}}});
}

}  // namespace

void run_training(const World& world, const Job& job, const RecipeData& data,
                  const CheckpointPlace& checkpoints) {
  // Of an earlier run. Who comes in a later generation finds this one's.
  if (!checkpoints.folder.empty() && !checkpoints.resume && world.rank() == 0 &&
      generations_published(*world.segment()) == 0)
    std::filesystem::remove_all(checkpoints.folder);
  if (job.model.name == "gpt") return train_text(world, job, data, checkpoints);
  const Dataset& rows = data.sets.train;
  const Objective objective = make_objective(job.loss, rows.class_count);
  const Model model = make_model(job.model, rows.sample_shape, objective.outputs, job.train.seed);
  const Task task{model.module, model.forward, objective.loss, objective.correct};
  const DatasetBatches train(rows, data.normalization, objective.target_form,
                             {.flip = job.dataset.augment.starts_with("flip"),
                              .crop = job.dataset.augment.ends_with("crop"),
                              .seed = job.train.seed});
  std::optional<DatasetBatches> held_out;
  if (data.sets.test.rows > 0)
    held_out.emplace(data.sets.test, data.normalization, objective.target_form);
  const BatchSource* test = held_out ? &*held_out : nullptr;
  const std::vector<NamedTensor> extra = input_tensors(data.normalization, rows.feature_names);

  if (job.optimizer.name == "closed_form") {
    fit_closed_form(world, job, rows, task, train, test, extra);
  } else if (!fit(world, job, data, trainer_options(job, extra, checkpoints), task, train, test)
                  .is_member) {
    return;
  }
  const bool unbalanced = job.dataset.keep_fraction < 1 || job.dataset.partition == "stratified" ||
                          job.dataset.partition == "weighted";
  if (unbalanced && task.correct && test != nullptr)
    // There are no newcomers any more: those who are left begin again.
    world.in_generations([&] {
      report_recall(world, task, *test, data.sets.test);
      return true;
    });
  if (!data.known_weights.empty() && job.model.widths.empty())
    report_distance(world, data, solution_of(*model.module, data.normalization));
}

}  // namespace lockstep
