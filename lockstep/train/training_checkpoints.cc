#include "lockstep/train/training_checkpoints.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/parallel/text_of_rank_0.h"
#include "lockstep/train/kept_progress.h"

namespace lockstep {
namespace {

constexpr const char* kHint =
    "resume with the settings that the run was started with, or train from the start elsewhere";

std::string state_text(const JobSettings& job, const Progress& progress,
                       const std::vector<std::uint64_t>& group_steps) {
  return nlohmann::json{{"job", job}, {"progress", to_json(progress)}, {"group_steps", group_steps}}
      .dump();
}

void check_tensor(const Checkpoint& file, const StateTensor& tensor) {
  const Manifest::Tensor* saved = file.find(tensor.name);
  if (saved == nullptr)
    throw ConfigError(
        fmt::format("{}: there is no tensor {}", file.path().string(), shown_name(tensor.name)),
        kHint);
  if (saved->dtype != tensor.dtype || saved->shape != tensor.shape ||
      saved->bytes != tensor.bytes.size())
    throw ConfigError(
        fmt::format("{}: tensor {} is {} [{}], here {} [{}]", file.path().string(),
                    shown_name(tensor.name), name_of(saved->dtype), fmt::join(saved->shape, ", "),
                    name_of(tensor.dtype), fmt::join(tensor.shape, ", ")),
        kHint);
}

}  // namespace

FoundCheckpoint find_checkpoint(const World& world, const std::filesystem::path& folder) {
  FoundCheckpoint found;
  const std::string text = text_of_rank_0(world, [&] {
    NewestCheckpoint newest = newest_checkpoint(folder);
    found.file = std::move(newest.checkpoint);
    nlohmann::json all = {{"broken", newest.skipped}, {"path", ""}};
    if (found.file) {
      all["path"] = found.file->path().string();
      all["state"] = nlohmann::json::parse(found.file->state());
    }
    return all.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  });
  const nlohmann::json all = nlohmann::json::parse(text);
  found.broken = all.at("broken").get<std::vector<std::string>>();
  found.path = all.at("path");
  if (found.path.empty()) return found;
  try {
    const nlohmann::json& state = all.at("state");
    found.job = state.at("job").get<JobSettings>();
    found.progress = progress_from(state.at("progress"));
    found.group_steps = state.at("group_steps").get<std::vector<std::uint64_t>>();
  } catch (const nlohmann::json::exception& error) {
    throw ConfigError(
        fmt::format("{}: no checkpoint of a training run: {}", found.path, error.what()),
        "a folder that lockstep train or a Trainer has written");
  }
  return found;
}

InitialState initial_state(const FoundCheckpoint& found) {
  const auto fill = [&found](std::span<const StateTensor> tensors, std::span<std::byte> note,
                             std::span<std::byte> log) {
    for (const StateTensor& tensor : tensors) check_tensor(*found.file, tensor);
    if (found.file->tensors().size() != tensors.size())
      throw ConfigError(fmt::format("{}: holds {} tensors, the model and its optimizer have {}",
                                    found.path, found.file->tensors().size(), tensors.size()),
                        kHint);
    for (const StateTensor& tensor : tensors) found.file->read(tensor.name, tensor.bytes);
    const StepNote progress = note_of(found.progress);
    std::memcpy(note.data(), &progress, sizeof progress);
    write_log(log, found.progress.epochs);
  };
  return {.step = static_cast<std::uint64_t>(found.progress.step),
          .group_steps = found.group_steps,
          .fill = fill};
}

CheckpointWriter::CheckpointWriter(World world, const TrainerOptions& options, JobSettings job)
    : world_(std::move(world)), options_(options), job_(std::move(job)), faults_(world_) {}

void CheckpointWriter::save(const SharedWeights& weights, const Progress& progress, bool always) {
  const bool wanted = options_.checkpoint_every_epochs > 0 || options_.checkpoint_every_steps > 0;
  if (!wanted || options_.checkpoint_dir.empty() || world_.rank() != 0) return;
  if (!saver_)
    saver_.emplace(options_.checkpoint_dir, CheckpointOptions{.keep = options_.checkpoint_keep});
  if (!always && !saver_->is_idle()) return;
  await_idle();
  const auto step = static_cast<std::uint64_t>(progress.step);
  std::vector<std::uint64_t> best;
  if (const auto index = best_epoch(options_, progress.epochs))
    best.push_back(static_cast<std::uint64_t>(progress.epochs[*index].step));
  CheckpointContents contents{
      .step = step, .state = state_text(job_, progress, weights.group_steps()), .tensors = {}};
  for (const StateTensor& tensor : weights.state_tensors())
    contents.tensors.push_back({tensor.name, tensor.dtype, tensor.shape, tensor.bytes});
  saver_->save(contents, best);
  faults_.at(Point::checkpoint, step);
  if (options_.callbacks.on_checkpoint)
    options_.callbacks.on_checkpoint({.step = progress.step,
                                      .path = checkpoint_path(options_.checkpoint_dir, step),
                                      .best = !best.empty() && best[0] == step});
}

// A disk may be slow: who waits for it does not hang.
void CheckpointWriter::await_idle() {
  while (!saver_->is_idle()) {
    world_.made_progress();
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

void CheckpointWriter::finish() {
  if (!saver_) return;
  await_idle();
  saver_->wait();
}

}  // namespace lockstep
