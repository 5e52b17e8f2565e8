// Data parallelism over replicas, as PyTorch's DistributedDataParallel: every rank holds the whole
// module and computes its own batch; when backward() ends, the gradients are averaged over the
// ranks, so that any optimizer steps every replica alike.
//
//   auto model = data_parallel(net, world);
//   model->forward(batch.data)… .backward();  // net->parameters() now hold averaged gradients
//
// Owner: the DataParallel shares the module with the caller and watches its parameters as long as
// it lives: keep it. Threads: one. backward() becomes a collective: every rank runs it equally
// often. It throws CommError where a rank fails, is late or computes something else.
#pragma once

#include <memory>
#include <utility>

#include "lockstep/cluster/world.h"

namespace torch::nn {
class Module;
}

namespace lockstep {

struct DataParallelOptions {
  // After every backward, rank 0's buffers (a batch norm's running statistics) on all ranks.
  bool broadcast_buffers = true;
};

// The part that does not depend on the module's type.
//
// Gradients are summed in canonical order (DESIGN, "The canonical tree") and divided once, so the
// bits are those of one process doing the same. They then lie in the group's memory and .grad is a
// view of it until it is reset: clone what must outlast the next backward. A parameter that this
// rank's loss did not use contributes zero; one that no rank used keeps an undefined .grad. Without
// zero_grad() a second backward accumulates: the gradients so far, equal on all ranks, plus the
// average of the new ones.
class Replica {
 public:
  // Compares names, shapes, dtypes and requires_grad over the ranks, then gives rank 0's values to
  // all. Throws ConfigError naming the tensor that differs or cannot be averaged.
  Replica(torch::nn::Module& module, const World& world, const DataParallelOptions& options);
  ~Replica();
  void set_weight(double weight);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

template <typename Holder>
class [[nodiscard]] DataParallel {
 public:
  DataParallel(Holder module, const World& world, const DataParallelOptions& options)
      : module_(std::move(module)), replica_(std::make_shared<Replica>(*module_, world, options)) {}

  auto* operator->() { return &*module_; }
  const Holder& module() const { return module_; }
  template <typename... Inputs>
  auto operator()(Inputs&&... inputs) {
    return module_->forward(std::forward<Inputs>(inputs)...);
  }
  // What this rank's gradients count for from the next backward on: the average is
  // sum(weight * gradient) / sum(weight) over the ranks. 1 unless set; for a loss that is a mean
  // over the batch, the number of its samples. Zero is allowed as long as some rank has more.
  void set_weight(double weight) { replica_->set_weight(weight); }

 private:
  Holder module_;
  std::shared_ptr<Replica> replica_;
};

// `module`: a TORCH_MODULE holder or a std::shared_ptr to a module.
template <typename Holder>
DataParallel<Holder> data_parallel(Holder module, const World& world,
                                   const DataParallelOptions& options = {}) {
  return DataParallel<Holder>(std::move(module), world, options);
}

}  // namespace lockstep
