// `lockstep bench training` on one rank: steps of a work in one mode, for some seconds. One thread.
//
//   shared_weights  one copy of the weights, as the Trainer
//   data_parallel   data_parallel and torch::optim, as a program of one's own
//   independent     each worker has shared weights of its own and never communicates
#pragma once

#include <string>

#include "lockstep/bridge/autocast.h"
#include "lockstep/cluster/world.h"
#include "lockstep/recipes/works.h"

namespace lockstep {

struct TrainingBench {
  std::string work = "W1";
  std::string mode = "shared_weights";
  double seconds = 10;  // measured, after as much as it takes to warm up
  Precision precision = Precision::fp32;
};

// Trains, and sends what it measured to the agent, from every rank: a "solution" event with rank,
// batch_size, parameters, steps, seconds, page_faults and peak_memory_bytes (observe/event.h).
// Throws ConfigError: no such work or mode.
void run_training_bench(const World& world, const TrainingBench& bench);

}  // namespace lockstep
