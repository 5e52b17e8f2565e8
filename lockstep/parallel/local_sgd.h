// Training that communicates every so many steps: each rank steps its own replica with any
// torch::optim optimizer on its own batches; now and then the ranks meet and agree on parameters.
//
//   LocalSgd  they become the average (Lin et al., "Don't Use Large Mini-Batches, Use Local SGD",
//             2018; torch's PeriodicModelAverager and, with warmup_steps, its
//             PostLocalSGDOptimizer)
//   DiLoCo    the average change since the last meeting is the gradient of an outer optimizer, SGD
//             with Nesterov momentum (Douillard et al., 2023; torchft's DiLoCo); the inner one
//             keeps its own state, and is AdamW in the paper
//
//   DiLoCo diloco(*net, world, {.sync_every = 50});
//   … .backward(); optimizer.step(); diloco.step();
//
// The result is not that of training in lockstep, but the same on every run with as many ranks; at
// a meeting it is the same on every rank, bit for bit. Parameters are dense fp32 on the CPU.
//
// Owner: shares the parameters with the caller. One thread. Collective: every rank makes the same
// calls. Throws CommError where a rank fails, is late or is elsewhere: the parameters are then
// those of this rank's last step.
#pragma once

#include <memory>
#include <vector>

#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/cluster/world.h"
#include "lockstep/collective/wire_format.h"

namespace lockstep {

struct LocalSgdOptions {
  int sync_every = 10;                        // steps from one meeting to the next
  int warmup_steps = 0;                       // of the first so many, each ends with a meeting
  WireFormat wire_format = WireFormat::fp32;  // in which the changes travel
};

struct DiLoCoOptions {
  int sync_every = 50;
  double outer_lr = 0.7;
  double outer_momentum = 0.9;
  bool nesterov = true;
  WireFormat wire_format = WireFormat::fp32;
};

// What both have in common.
class LocalSteps {
 public:
  virtual ~LocalSteps();
  // After each optimizer.step(). True: this one ended with a meeting.
  bool step();
  // Meets now, unless the last step did: before evaluating or saving. Float buffers (a batch norm's
  // running statistics) become their averages at every meeting, too.
  void synchronize();
  // What a program that goes on from a meeting needs besides parameters and optimizer, to be
  // written in place: "agreed", the parameters of the last meeting, flat; "velocity" of DiLoCo;
  // "steps" made.
  std::vector<NamedTensor> state() const;
  CompressedGroup::Errors& wire_errors();  // as DataParallel's

 protected:
  LocalSteps(torch::nn::Module& module, const World& world, int warmup_steps,
             const DiLoCoOptions& options);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Both constructors compare the module over the ranks and give rank 0's values to all. Throw
// ConfigError naming what differs, cannot be averaged or is out of range.
class LocalSgd : public LocalSteps {
 public:
  LocalSgd(torch::nn::Module& module, const World& world, const LocalSgdOptions& options = {});
};
class DiLoCo : public LocalSteps {
 public:
  DiLoCo(torch::nn::Module& module, const World& world, const DiLoCoOptions& options = {})
      : LocalSteps(module, world, 0, options) {}
};

}  // namespace lockstep
