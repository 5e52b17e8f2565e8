#include "lockstep/train/trainer.h"

#include <fmt/format.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/observe/event.h"
#include "lockstep/train/kept_progress.h"
#include "lockstep/train/run.h"

namespace lockstep {
namespace {

void check(const World& world, const TrainerOptions& options, const Task& task,
           std::uint64_t samples, const BatchSource* test) {
  const int workers = world.most_size();
  if (samples == 0) throw ConfigError("the training set is empty");
  if (options.virtual_ranks < workers)
    throw ConfigError(fmt::format("{} workers, but train.virtual_ranks is {}: a worker would have "
                                  "nothing to do",
                                  workers, options.virtual_ranks),
                      fmt::format("--workers {} or fewer", options.virtual_ranks));
  if (samples < static_cast<std::uint64_t>(options.virtual_ranks))
    throw ConfigError(
        fmt::format("{} workers (train.virtual_ranks = {}) for {} training samples: more workers "
                    "than samples",
                    workers, options.virtual_ranks, samples),
        fmt::format("--workers {} or fewer", samples));
  if (options.patience > 0 && test == nullptr)
    throw ConfigError("train.patience needs a test set",
                      "split.test = 0.1 holds a tenth of the rows out");
  if (options.epochs > kMaxEpochs)
    throw ConfigError(fmt::format("train.epochs = {}: there can be {}", options.epochs, kMaxEpochs),
                      "train.max_steps and train.tolerance end a run, too");
  if (options.monitor == Monitor::test_accuracy && test != nullptr && !task.correct)
    throw ConfigError("train.monitor = \"test_accuracy\": this loss knows no accuracy",
                      "train.monitor = \"test_loss\"");
}

// What becomes of a folder with checkpoints, or without: said to the agent, else on stderr.
void tell(const World& world, const FoundCheckpoint& found, bool resume) {
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
  if (world.rank() == 0) tell(world, found, options.resume);
  return found;
}

}  // namespace

Trainer::Trainer(World world, TrainerOptions options)
    : world_(std::move(world)), options_(std::move(options)) {}

FitReport Trainer::fit(const Task& task, const OptimizerOptions& optimizer,
                       const Schedule& schedule, const BatchSource& train,
                       const BatchSource* test) {
  world_.declare_elastic();
  world_.join();
  Session session(world_);
  const auto in_this_generation = [&]() -> std::optional<FitReport> {
    TrainerOptions options = options_;
    FoundCheckpoint found;
    if (!SharedWeights::are_kept(world_,
                                 session.kept)) {  // else the run goes on with what is there
      found = find(world_, options);
      if (options.virtual_ranks == 0) {
        options.virtual_ranks = world_.most_size();
        for (const auto& [name, value] : found.job)
          if (name == "virtual_ranks") options.virtual_ranks = std::stoi(value);
      }
      check(world_, options, task, train.size(), test);
      if (!found.path.empty())
        if (const std::string difference =
                first_difference(settings_of(options, optimizer, schedule, train, test), found.job);
            !difference.empty())
          throw ConfigError(fmt::format("{} is of another job: {}", found.path, difference),
                            "resume with the settings that the run was started with, or train "
                            "from the start elsewhere");
    }
    return Run(world_, options, task, optimizer, schedule, train, test, found, session).go();
  };
  std::optional<FitReport> report;
  bool is_first = true;
  const bool is_member = world_.in_generations([&] {
    if (!std::exchange(is_first, false)) session.timer.enter_generation();
    report = in_this_generation();
    return report.has_value();
  });
  if (is_member) return *std::move(report);
  FitReport nothing;
  nothing.is_member = false;
  return nothing;
}

}  // namespace lockstep
