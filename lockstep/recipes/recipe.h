// A job made real: its data loaded, its model and loss built, its weights fitted or applied. What
// lockstep-worker runs.
#pragma once

#include <filesystem>
#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/data/dataset.h"
#include "lockstep/data/partition.h"
#include "lockstep/job/job.h"
#include "lockstep/train/batches.h"

namespace lockstep {

struct RecipeData {
  TrainTest sets;
  Normalization normalization;
  Partition partition;               // of the training set
  std::vector<float> known_weights;  // linear-regression: what the data was made from
  float known_bias = 0;
};
// Reads or makes the job's data. Throws ConfigError naming the file and what is wrong.
RecipeData load_recipe_data(const Job& job);

// Where checkpoints go, "": nowhere. `resume`: from the newest one there; else what an earlier run
// has left there is removed.
struct CheckpointPlace {
  std::filesystem::path folder = {};
  bool resume = false;
};
// Trains the job on its data, on this rank. Emits events; the agent writes all files but
// checkpoints.
void run_training(const World& world, const Job& job, const RecipeData& data,
                  const CheckpointPlace& checkpoints = {});

// Applies the weights in `weights` to the rows of `data` ("": the job's own test set): CSV lines by
// blocks of rows, each computed by one rank and sent to the agent as an event.
void run_prediction(const World& world, const Job& job, const std::filesystem::path& weights,
                    const std::filesystem::path& data);

}  // namespace lockstep
