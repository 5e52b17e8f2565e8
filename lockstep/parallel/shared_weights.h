// Data parallelism over one copy of the weights: weights and optimizer state live once in each
// node's shared memory, every rank's module points into it, and each rank updates a slice of them
// from all ranks' gradients. docs/shared-weights.md explains how, and why a rank, or a node, may be
// killed at any instant.
//
//   auto model = shared_weights(net, Adam({.lr = 1e-3}), world);
//   for (auto& batch : *loader) {
//     torch::cross_entropy_loss(model(batch.data), batch.target).backward();
//     model.step();  // instead of optimizer.step() and zero_grad()
//   }
//
// Owner: the module shares the memory, and outlives this as a module of its own. Threads: one.
// Constructors and the calls marked collective are called by all ranks alike; they throw CommError
// where a rank fails.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/bridge/autocast.h"
#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/cluster/world.h"
#include "lockstep/collective/comm_queue.h"
#include "lockstep/collective/wire_kernels.h"
#include "lockstep/update/optimizer.h"
#include "lockstep/update/step_record.h"

namespace torch::nn {
class Module;
}

namespace lockstep {

struct ParameterGroup {
  std::vector<at::Tensor> parameters;
  OptimizerOptions options;
};

struct SharedWeightsOptions {
  // Contributions to a step (DESIGN, "The canonical tree"); 0: one a rank.
  int virtual_ranks = 0;
  double clip_grad_norm = 0;  // of the mean gradient; 0: off
  Precision precision = Precision::fp32;
  // In which gradients travel between nodes, with error feedback; inside a node nothing is rounded.
  // Not fp32: all nodes' weights stay equal, bit for bit, but the result depends on which virtual
  // ranks each node computes.
  WireFormat wire_format = WireFormat::fp32;
  // Bytes that are kept with the weights, zeroed at first: the caller's, of no meaning here. A note
  // changes with every step, as the weights do; the log is written between steps, by local rank 0.
  std::size_t note_bytes = 0, log_bytes = 0;
  // Which of the job's weights these are, where they are made again in another generation
  // (World::claim_kept()); none: new ones.
  std::optional<int> kept = {};
};

struct StepOutcome {
  std::uint64_t step = 0;  // the committed step
  double loss_sum = 0;
  double weight = 0;
  // Of the mean gradient, before clipping. Measuring costs a pass over the gradients.
  std::optional<double> gradient_norm = {};
  // What all ranks are to do after this step's update: enter the next generation; end.
  bool next_generation = false, stop = false;
};

// How these weights began.
struct WeightsOrigin {
  bool found = false;          // by earlier workers of the job; else they are new
  bool from_peer = false;      // found: some node had none, or older ones, and took another's
  bool finished_step = false;  // found: the step under way was decided, and has been made whole
  std::string reason;          // found: what became of that step, in words
};

// A tensor of the training state, in shared memory.
struct StateTensor {
  std::string name;  // "model/fc.weight", "optimizer/fc.weight/exp_avg", "buffer/bn.running_mean"
  Dtype dtype = Dtype::float32;
  std::vector<std::int64_t> shape;
  std::span<std::byte> bytes;
};

// What new shared weights begin with, instead of the module's values.
struct InitialState {
  std::uint64_t step = 0;                  // committed
  std::vector<std::uint64_t> group_steps;  // updates that each group has made
  // Writes the tensors, the note and the log; on rank 0. A ConfigError is thrown on every rank.
  std::function<void(std::span<const StateTensor>, std::span<std::byte> note,
                     std::span<std::byte> log)>
      fill;
};

// A loss, a gradient or a buffer is infinite or no number. Nothing has changed.
class NonFiniteError : public Error {
 public:
  NonFiniteError(std::uint64_t step, const std::string& what);
};

// What lies in the weights' memory: the part that does not depend on the module's type.
class SharedWeights {
 public:
  // Collective. Compares the modules over the ranks; the values are rank 0's. Every parameter that
  // requires a gradient is in one group; the others are shared, too, and never change. Throws
  // ConfigError naming a parameter that is in no group or two, or is not dense fp32 on the CPU.
  // Where the job's earlier workers have left these weights, on any node, they are taken up as they
  // were committed, and the step that was being made when the last generation ended is made whole
  // or discarded; else they begin with the values of rank 0's module, or with `initial`.
  SharedWeights(torch::nn::Module& module, const World& world, std::vector<ParameterGroup> groups,
                const SharedWeightsOptions& options = {}, const InitialState* initial = nullptr);
  // All parameters in one group.
  SharedWeights(torch::nn::Module& module, const World& world, const OptimizerOptions& optimizer,
                const SharedWeightsOptions& options = {}, const InitialState* initial = nullptr);
  ~SharedWeights();
  // Collective. Whether some node has such weights (SharedWeightsOptions::kept), whole.
  static bool are_kept(const World& world, int kept);

  // --- A step: compute() or contribute(), then decide(), then update() ---
  // This rank's virtual ranks, in order: before each, buffers are as they were committed; compute()
  // runs forward and backward of a loss that is a sum, and returns it with what it is to be divided
  // by. No samples: it does nothing and returns zero.
  using Compute = std::function<VirtualLoss(int virtual_rank)>;
  void compute(const Compute& compute);
  // Within compute(), where a virtual rank's last backward() follows, of the weight that compute()
  // will return: across nodes its gradients travel while it runs. Without it they do when all of
  // them are there.
  void last_backward(double weight);
  // Where virtual ranks are ranks: the gradients that backward() has left, of a mean over `weight`.
  void contribute(double weight);
  // Collective. Everyone's contributions are complete; what the step does is fixed. Throws Error on
  // every rank if a loss or the sum of the gradients is not finite: nothing has changed then, and
  // the same step may be computed again. measure: gradient_norm is wanted.
  StepOutcome decide(bool measure = false);
  // Collective. Makes the update; on return all weights are those of the step, and the note is
  // `note`, which is equal on all ranks.
  void update(std::span<const std::byte> note = {});

  // Learning rates and the like, by group, from the next decide() on; equal on all ranks.
  std::span<OptimizerOptions> groups() const;
  std::uint64_t committed_step() const;
  int virtual_ranks() const;
  const WeightsOrigin& origin() const;
  std::span<const std::byte> note() const;
  std::span<std::byte> log() const;     // log_bytes at least
  std::size_t parameter_count() const;  // without padding; frozen ones included
  std::size_t shared_bytes() const;     // one copy of weights, optimizer state, journals
  VirtualRange run() const;             // the virtual ranks that this rank computes
  // What gradients took between nodes, and of that what decide() waited for, in this generation.
  CommQueue::Statistics communication() const;

  // Every parameter, and every buffer as it was committed, by name as in the module. Valid as long
  // as this.
  std::vector<NamedTensor> state() const;
  bool is_finite() const;  // all of it
  // The whole training state, for who saves it: unchanged between update() and decide().
  std::vector<StateTensor> state_tensors() const;
  std::vector<std::uint64_t> group_steps() const;  // updates that each group has made

  // Collective; between steps. edit() runs on rank 0 alone, where alone weights can be written
  // then; other writes end the process with a message.
  void edit(const std::function<void()>& edit);
  // Buffers as they were committed, in the module: at the start of an evaluation, say.
  void restore_buffers();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

template <typename Holder>
class [[nodiscard]] SharedModel {
 public:
  SharedModel(Holder module, const World& world, std::vector<ParameterGroup> groups,
              const SharedWeightsOptions& options)
      : module_(std::move(module)),
        precision_(options.precision),
        weights_(std::make_shared<SharedWeights>(*module_, world, std::move(groups), options)) {}
  SharedModel(Holder module, const World& world, const OptimizerOptions& optimizer,
              const SharedWeightsOptions& options)
      : module_(std::move(module)),
        precision_(options.precision),
        weights_(std::make_shared<SharedWeights>(*module_, world, optimizer, options)) {}

  auto* operator->() { return &*module_; }
  const Holder& module() const { return module_; }
  template <typename... Inputs>
  auto operator()(Inputs&&... inputs) {
    const Autocast autocast(precision_);
    return module_->forward(std::forward<Inputs>(inputs)...);
  }
  // What this rank's gradients count for from the next step on, as DataParallel::set_weight.
  void set_weight(double weight) { weight_ = weight; }
  // Collective. The update from the gradients of all backwards since the last one.
  StepOutcome step() {
    weights_->contribute(weight_);
    return update();
  }
  // Collective. The update from what `compute` computes for each of this rank's virtual ranks
  // (SharedWeights::compute): so the bits are those of any other number of ranks.
  StepOutcome step(const SharedWeights::Compute& compute) {
    const Autocast autocast(precision_);
    weights_->compute(compute);
    return update();
  }
  const StepOutcome& last() const { return last_; }  // step's
  std::span<OptimizerOptions> groups() const { return weights_->groups(); }
  SharedWeights& weights() const { return *weights_; }

 private:
  StepOutcome update() {
    last_ = weights_->decide();
    weights_->update();
    return last_;
  }
  Holder module_;
  Precision precision_;
  double weight_ = 1;
  StepOutcome last_;
  std::shared_ptr<SharedWeights> weights_;
};

// `module`: a TORCH_MODULE holder or a std::shared_ptr to a module. `optimizer`: Adam({.lr = …})
// and the like, or a std::vector<ParameterGroup>.
template <typename Holder, typename Optimizer>
SharedModel<Holder> shared_weights(Holder module, const Optimizer& optimizer, const World& world,
                                   const SharedWeightsOptions& options = {}) {
  if constexpr (std::is_convertible_v<const Optimizer&, OptimizerOptions>)
    return {std::move(module), world, OptimizerOptions(optimizer), options};
  else
    return {std::move(module), world, optimizer, options};
}

// Runs `edit` where weights can be written, on rank 0, for all. Collective, between steps.
template <typename Holder, typename Edit>
void edit_weights(const SharedModel<Holder>& model, Edit&& edit) {
  model.weights().edit(std::forward<Edit>(edit));
}

}  // namespace lockstep
