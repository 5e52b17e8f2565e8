#include "lockstep/train/progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "lockstep/base/hash.h"
#include "lockstep/train/events.h"

namespace lockstep {
namespace {

// JSON has no infinities: what is not finite travels as null.
double number(const nlohmann::json& json, const char* member) {
  const nlohmann::json& value = json.at(member);
  return value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.get<double>();
}

double monitored(const TrainerOptions& options, const EpochSummary& epoch) {
  return options.monitor == Monitor::test_loss ? epoch.test_loss : -epoch.test_accuracy;
}

// How many epochs passed since the last one that was better than all before by more than min_delta.
std::int64_t epochs_without_progress(const TrainerOptions& options,
                                     const std::vector<EpochSummary>& epochs) {
  double best = std::numeric_limits<double>::infinity();
  std::int64_t since = 0;
  for (const EpochSummary& epoch : epochs) {
    ++since;
    if (monitored(options, epoch) < best - (std::isinf(best) ? 0 : options.min_delta)) {
      best = monitored(options, epoch);
      since = 0;
    }
  }
  return since;
}

std::string tolerance_reason(const TrainerOptions& options, const EpochSummary& before,
                             const EpochSummary& last) {
  const double change = options.tolerance_of_gradient_norm
                            ? std::abs(last.gradient_norm - before.gradient_norm)
                            : std::abs(last.train_loss - before.train_loss);
  if (!(change < options.tolerance)) return "";
  return fmt::format("the {} changed by {:.3g} in epoch {}, less than train.tolerance = {:g}",
                     options.tolerance_of_gradient_norm ? "gradient norm" : "loss", change,
                     last.epoch, options.tolerance);
}

}  // namespace

std::string stop_reason(const TrainerOptions& options, const std::vector<EpochSummary>& epochs) {
  const EpochSummary& last = epochs.back();
  if (options.max_steps > 0 && last.step >= options.max_steps)
    return fmt::format("train.max_steps = {}", options.max_steps);
  if (options.tolerance > 0 && epochs.size() >= 2)
    if (std::string reason = tolerance_reason(options, epochs[epochs.size() - 2], last);
        !reason.empty())
      return reason;
  if (options.patience > 0 && epochs_without_progress(options, epochs) >= options.patience)
    return fmt::format("the {} did not become better in {} epoch{} (train.patience)",
                       options.monitor == Monitor::test_loss ? "test loss" : "test accuracy",
                       options.patience, options.patience == 1 ? "" : "s");
  if (last.epoch >= options.epochs)
    return fmt::format("{} epoch{}", options.epochs, options.epochs == 1 ? "" : "s");
  return "";
}

std::optional<std::size_t> best_epoch(const TrainerOptions& options,
                                      const std::vector<EpochSummary>& epochs) {
  std::optional<std::size_t> best;
  for (std::size_t i = 0; i < epochs.size(); ++i)
    if (epochs[i].evaluated &&
        (!best || monitored(options, epochs[i]) < monitored(options, epochs[*best])))
      best = i;
  return best;
}

nlohmann::json to_json(const Progress& progress) {
  nlohmann::json epochs = nlohmann::json::array();
  for (const EpochSummary& epoch : progress.epochs) epochs.push_back(epoch_event(epoch));
  return {{"step", progress.step},
          {"samples", progress.samples},
          {"grad_norm", progress.gradient_norm},
          {"epochs", std::move(epochs)},
          {"step_of_epoch", progress.step_of_epoch},
          {"loss", progress.loss},
          {"weight", progress.weight},
          {"seconds", progress.seconds}};
}

Progress progress_from(const nlohmann::json& json) {
  Progress progress;
  progress.step = json.at("step");
  progress.samples = json.at("samples");
  progress.gradient_norm = number(json, "grad_norm");
  progress.step_of_epoch = json.at("step_of_epoch");
  progress.loss = number(json, "loss");
  progress.weight = number(json, "weight");
  progress.seconds = number(json, "seconds");
  for (const nlohmann::json& event : json.at("epochs")) {
    EpochSummary& epoch = progress.epochs.emplace_back();
    epoch.epoch = event.at("epoch");
    epoch.step = event.at("step");
    epoch.train_loss = number(event, "train_loss");
    epoch.evaluated = event.contains("test_loss");
    if (epoch.evaluated) epoch.test_loss = number(event, "test_loss");
    epoch.has_accuracy = event.contains("test_accuracy");
    if (epoch.has_accuracy) epoch.test_accuracy = number(event, "test_accuracy");
    epoch.gradient_norm = number(event, "grad_norm");
    epoch.lr = number(event, "lr");
    epoch.samples = event.at("samples");
    epoch.seconds = number(event, "seconds");
    epoch.evaluation_seconds = number(event, "eval_seconds");
  }
  return progress;
}

JobSettings settings_of(const TrainerOptions& options, const OptimizerOptions& optimizer,
                        const Schedule& schedule, std::uint64_t train_samples,
                        std::uint64_t test_samples) {
  JobSettings settings = options.job;
  const auto add = [&](const char* name, const auto& value) {
    settings.emplace_back(name, fmt::format("{}", value));
  };
  add("training samples", train_samples);
  add("test samples", test_samples);
  add("max_steps", options.max_steps);
  add("global_batch_size", options.global_batch_size);
  add("virtual_ranks", options.virtual_ranks);
  add("accumulate", options.accumulate);
  add("seed", options.seed);
  add("shuffle", options.shuffle);
  add("partition", name_of(options.partition.kind));
  std::uint64_t digest = 0;
  for (const std::uint64_t key : options.partition.keys) digest = mix({digest, key});
  for (const double weight : options.partition.weights)
    digest = mix({digest, std::bit_cast<std::uint64_t>(weight)});
  add("the digest of the partition", digest);
  add("clip_grad_norm", options.clip_grad_norm);
  add("precision", options.precision == Precision::bf16 ? "bf16" : "fp32");
  add("wire_format", name_of(options.wire_format));
  add("the kind of optimizer", static_cast<int>(optimizer.kind));
  add("lr", optimizer.lr);
  add("momentum", optimizer.momentum);
  add("dampening", optimizer.dampening);
  add("nesterov", optimizer.nesterov);
  add("betas.first", optimizer.betas.first);
  add("betas.second", optimizer.betas.second);
  add("eps", optimizer.eps);
  add("weight_decay", optimizer.weight_decay);
  add("amsgrad", optimizer.amsgrad);
  add("lr_decay", optimizer.lr_decay);
  add("initial_accumulator_value", optimizer.initial_accumulator_value);
  add("alpha", optimizer.alpha);
  add("centered", optimizer.centered);
  add("the kind of schedule", static_cast<int>(schedule.kind));
  if (schedule.kind == Schedule::Kind::cosine) {
    add("schedule.total_steps", schedule.total_steps);
    add("schedule.min_lr", schedule.min_lr);
  }
  add("schedule.warmup_steps", schedule.warmup_steps);
  if (schedule.kind == Schedule::Kind::step) {
    add("schedule.step_size", schedule.step_size);
    add("schedule.gamma", schedule.gamma);
  }
  return settings;
}

std::string first_difference(const JobSettings& here, const JobSettings& in_checkpoint) {
  const auto value_in = [](const JobSettings& settings, const std::string& name) -> std::string {
    const auto found = std::ranges::find(settings, name, &JobSettings::value_type::first);
    return found == settings.end() ? "missing" : found->second;
  };
  for (const JobSettings* settings : {&here, &in_checkpoint})
    for (const auto& [name, value] : *settings)
      if (const std::string mine = value_in(here, name), other = value_in(in_checkpoint, name);
          mine != other)
        return fmt::format("{} is {}, in the checkpoint {}", name, mine, other);
  return "";
}

}  // namespace lockstep
