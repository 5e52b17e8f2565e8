// Data parallelism over replicas, as PyTorch's DistributedDataParallel: every rank holds the whole
// module and computes its own batch; when backward() returns, the gradients are averaged over the
// ranks, so that any optimizer steps every replica alike.
//
//   auto model = data_parallel(net, world);
//   model->forward(batch.data)… .backward();  // net->parameters() now hold averaged gradients
//
// Owner: the DataParallel and its guards share the module's replica with the caller, and it watches
// the parameters as long as it lives: keep it. Threads: one. backward() becomes a collective: every
// rank runs it equally often. It throws CommError where a rank fails, is late or computes something
// else, and ConfigError, the same on every rank, where gradients cannot be averaged.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "lockstep/bridge/autocast.h"
#include "lockstep/cluster/world.h"
#include "lockstep/collective/comm_queue.h"
#include "lockstep/collective/wire_format.h"

namespace torch::nn {
class Module;
}

namespace lockstep {

struct DataParallelOptions {
  // After every synchronised backward, rank 0's buffers (a batch norm's running statistics) on all
  // ranks; under join the first rank's that has not run out.
  bool broadcast_buffers = true;
  // Gradients are reduced in buckets of about this size while backward runs, last layer first (the
  // first bucket: a quarter, at most 1 MiB), in the same order on every rank. Unset: with overlap a
  // sixteenth of the gradients, from 0.25 to 4 MiB, otherwise all at once, when the last one is
  // there. Between ranks of one node that is faster: the cores that would add are those that still
  // compute, so an early bucket hides nothing, and each bucket is a meeting at which all wait for
  // the slowest, whereas over a whole backward the ranks' leads and lags cancel out.
  std::optional<double> bucket_cap_mb = {};
  // Buckets are reduced by a thread of their own, so that backward goes on meanwhile. From the
  // first gradient until backward() returns, the world's groups are that thread's: hooks make no
  // collectives. Unset: where the world spans nodes.
  std::optional<bool> overlap = {};
  // Whether a rank's loss may leave out parameters: those contribute zero, and one that no rank
  // used keeps the .grad it had. Otherwise they are an error that names them, on every rank: mostly
  // they are a mistake, such as a layer that is registered and never called.
  bool find_unused_parameters = false;
  // bf16: forward() runs under autocast. Compute the loss in the same expression or not, but call
  // backward() in a statement of its own. Parameters, gradients and the optimizer stay fp32.
  Precision precision = Precision::fp32;
  // In what form fp32 gradients travel; for links that are slower than computing. The averages are
  // then no longer exact, but the same on every rank (collective/wire_format.h).
  WireFormat wire_format = WireFormat::fp32;
};

struct JoinOptions {
  // Whether ranks that have run out still count: gradients are divided by the world's size (each
  // sample counts the same all along) or by the number of ranks that are not out.
  bool divide_by_initial_world_size = true;
  // All ranks throw Error as soon as one has run out.
  bool throw_on_early_termination = false;
  // What a rank that has run out does after each backward of the others, with the same .grad as
  // theirs: `[&] { optimizer.step(); optimizer.zero_grad(); }` keeps its optimizer's state equal.
  // Without it only parameters and buffers become equal, at the end.
  std::function<void()> after_shadow_backward = {};
};

// The part that does not depend on the module's type.
//
// Gradients are summed in canonical order (DESIGN, "The canonical tree") and divided once, so the
// bits are those of one process doing the same. They then lie in the group's memory and .grad shows
// it. Who keeps a gradient keeps its values; a .grad that others refer to stays the same tensor.
// Without zero_grad() a second backward accumulates: the gradients so far, equal on all ranks, plus
// the average of the new ones.
class Replica {
 public:
  // Compares names, shapes, dtypes and requires_grad over the ranks, then gives rank 0's values to
  // all. Throws ConfigError naming the tensor that differs or cannot be averaged.
  Replica(torch::nn::Module& module, const World& world, const DataParallelOptions& options);
  ~Replica();
  void set_weight(double weight);
  CommQueue::Statistics communication() const;
  CompressedGroup::Errors& wire_errors();

 private:
  friend class NoSync;
  friend class Join;
  struct State;
  std::unique_ptr<State> state_;
};

// While it lives, backward() accumulates in this rank's .grad alone. The next backward() without it
// averages the sums. What counts is where backward() runs; every rank does the same. Nests.
class [[nodiscard]] NoSync {
 public:
  explicit NoSync(std::shared_ptr<Replica> replica);
  ~NoSync();
  NoSync(const NoSync&) = delete;
  NoSync& operator=(const NoSync&) = delete;

 private:
  std::shared_ptr<Replica> replica_;
};

// For ranks with unequal numbers of batches, as torch's Join: a rank whose guard ends takes part in
// the others' backwards with zeros until all have come to the end of theirs. If the numbers
// differed, parameters and buffers are then those of the first rank that was among the last. Every
// rank has the guard, with the same options, and calls zero_grad() between synchronised backwards.
class [[nodiscard]] Join {
 public:
  Join(std::shared_ptr<Replica> replica, JoinOptions options);
  // finish(), unless an exception is passing: then this rank has failed, and the others' deadline
  // tells them.
  ~Join() noexcept(false);
  Join(const Join&) = delete;
  Join& operator=(const Join&) = delete;
  // Returns when all ranks are here. Throws as backward() does.
  void finish();

 private:
  std::shared_ptr<Replica> replica_;
  int exceptions_;
};

template <typename Holder>
class [[nodiscard]] DataParallel {
 public:
  DataParallel(Holder module, const World& world, const DataParallelOptions& options)
      : module_(std::move(module)),
        precision_(options.precision),
        replica_(std::make_shared<Replica>(*module_, world, options)) {}

  // The module, under the chosen precision to the end of the expression.
  auto operator->() { return Call{Autocast(precision_), &*module_}; }
  const Holder& module() const { return module_; }
  template <typename... Inputs>
  auto operator()(Inputs&&... inputs) {
    const Autocast autocast(precision_);
    return module_->forward(std::forward<Inputs>(inputs)...);
  }
  // What this rank's gradients count for from the next backward on: the average is
  // sum(weight * gradient) / sum(weight) over the ranks. 1 unless set; for a loss that is a mean
  // over the batch, the number of its samples. Zero is allowed as long as some rank has more.
  void set_weight(double weight) { replica_->set_weight(weight); }
  // With overlap: how long gradients were under way so far, and how much of that backward() waited
  // for; the rest was hidden behind computing.
  CommQueue::Statistics communication() const { return replica_->communication(); }
  // What wire_format has lost so far and will send yet: this rank's part of a checkpoint. Without
  // it a program that goes on, or a new generation, starts with none lost.
  CompressedGroup::Errors& wire_errors() { return replica_->wire_errors(); }
  NoSync no_sync() { return NoSync(replica_); }
  Join join(JoinOptions options = {}) { return Join(replica_, std::move(options)); }

 private:
  using Module = std::remove_reference_t<decltype(*std::declval<Holder&>())>;
  struct Call {
    Autocast autocast;
    Module* module;
    Module* operator->() const { return module; }
  };
  Holder module_;
  Precision precision_;
  std::shared_ptr<Replica> replica_;
};

// `module`: a TORCH_MODULE holder or a std::shared_ptr to a module.
template <typename Holder>
DataParallel<Holder> data_parallel(Holder module, const World& world,
                                   const DataParallelOptions& options = {}) {
  return DataParallel<Holder>(std::move(module), world, options);
}

}  // namespace lockstep
