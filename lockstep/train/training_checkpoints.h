// A run's checkpoints: the whole training state (SharedWeights::state_tensors()) with the run's
// progress and the settings that it goes on with. Rank 0 reads and writes them; all ranks share the
// memory that they hold, so that any number of ranks goes on from them. One thread.
//
// The state in a manifest: {"job": [[name, value], …], "progress": {…}, "group_steps": [n, …]}
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "lockstep/checkpoint/async_saver.h"
#include "lockstep/cluster/fault_injector.h"
#include "lockstep/cluster/world.h"
#include "lockstep/parallel/shared_weights.h"
#include "lockstep/train/progress.h"

namespace lockstep {

// The newest whole checkpoint of a folder, as every rank knows it.
struct FoundCheckpoint {
  std::optional<Checkpoint> file;  // on rank 0
  std::string path;                // "": there is none
  JobSettings job;
  Progress progress;
  std::vector<std::uint64_t> group_steps;
  std::vector<std::string> broken;  // newer ones: what is wrong with each
};
// Collective. Throws ConfigError, on every rank, for one that Trainer did not write.
FoundCheckpoint find_checkpoint(const World& world, const std::filesystem::path& folder);

// What weights that are made from it begin with. Making them throws ConfigError naming the tensor
// that the model lacks, or has in another shape or type. `found` is to outlive it.
InitialState initial_state(const FoundCheckpoint& found);

// Of one rank; writes while it is rank 0.
class CheckpointWriter {
 public:
  CheckpointWriter(World world, const TrainerOptions& options, JobSettings job);
  // Copies the state and lets a thread write it. Throws Error where the one before could not be
  // written. While the one before is being written: waits, or does nothing where that is enough.
  void save(const SharedWeights& weights, const Progress& progress, bool always);
  void finish();  // all are written; throws Error

 private:
  void await_idle();
  const World world_;
  const TrainerOptions options_;
  const JobSettings job_;
  FaultInjector faults_;
  std::optional<AsyncSaver> saver_;
};

}  // namespace lockstep
