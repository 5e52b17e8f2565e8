// A training loop of one's own that goes on when workers die, hang, join or leave:
//
//   const auto world = lockstep::init({.join = false});      // the others do not wait while
//   Net net;                                                 // this worker loads its data
//   lockstep::elastic::Shared state(net, lockstep::Adam({.lr = 1e-3}));
//   lockstep::elastic::run(world, state, [&](auto& model) {
//     if (state.step() == 1000) return false;                // there is none left
//     model.step([&](int virtual_rank) -> lockstep::VirtualLoss {
//       const auto batch = my_batch(state.step(), virtual_rank);
//       const auto loss = my_loss(net->forward(batch.data), batch.target);  // a sum
//       loss.backward();
//       return {loss.template item<double>(), batch.size()};
//     });
//     return true;
//   });
//
// under `lockstep run --max-restarts N`. A step is all or nothing: one that did not come to its end
// on all ranks is done again by the next generation's, so that what a step does follows from
// state.step(), and libtorch's random numbers in it from the step and the rank.
//
// Owner: the state outlives run(). One thread. Collective; between init() and run() there are no
// other collectives, because new workers take the same way.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/shared_weights.h"

namespace torch::optim {
class Optimizer;
}

namespace lockstep::elastic {

enum class End {
  done,      // there was no step left
  stopped,   // the job was asked to stop, and every rank has come to the end of this step
  released,  // the job goes on without this worker
};

// What is kept from one generation to the next: the part that does not depend on types.
class State {
 public:
  virtual ~State() = default;
  std::uint64_t step() const { return step_; }  // those that all ranks have made

 protected:
  struct Agreement {
    bool next_generation = false, stop = false;
  };
  // What a generation begins with: makes the model, and says where its state is from: "segment",
  // "peer" or "start". Collective.
  virtual std::string enter(const World& world) = 0;
  virtual void leave() = 0;       // the group is about to go
  virtual void begin_step() = 0;  // which may fail in the middle
  virtual Agreement end_step(const World& world) = 0;
  std::uint64_t step_ = 0;

 private:
  friend End run_steps(const World& world, State& state, const std::function<bool()>& step);
};

// One copy of weights and optimizer on each node, whatever happens to its workers; the same bits
// for any number of them (shared_weights.h).
template <typename Holder>
class Shared final : public State {
 public:
  // `optimizer`: as for shared_weights().
  template <typename Optimizer>
  Shared(Holder module, const Optimizer& optimizer, SharedWeightsOptions options = {}) {
    make_ = [=, this](const World& world) mutable {
      if (!options.kept) options.kept = world.claim_kept();
      model_.emplace(shared_weights(module, optimizer, world, options));
    };
  }
  SharedModel<Holder>& model() { return *model_; }

 private:
  std::string enter(const World& world) override {
    model_.reset();
    make_(world);
    step_ = model_->weights().committed_step();
    const WeightsOrigin& origin = model_->weights().origin();
    return origin.from_peer ? "peer" : origin.found ? "segment" : "start";
  }
  void leave() override { model_.reset(); }
  void begin_step() override {}
  Agreement end_step(const World&) override {
    step_ = model_->weights().committed_step();
    return {model_->last().next_generation, model_->last().stop};
  }
  std::function<void(const World&)> make_;
  std::optional<SharedModel<Holder>> model_;
};

// What replicas have in common: the newest whole one is given to all.
class Replicas : public State {
 public:
  Replicas(torch::nn::Module& module, torch::optim::Optimizer& optimizer);
  ~Replicas() override;

 protected:
  std::string enter(const World& world) override;
  void leave() override;
  void begin_step() override;
  Agreement end_step(const World& world) override;
  virtual void make_model(const World& world) = 0;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A replica on every rank (data_parallel.h), and one of libtorch's own optimizers. A step calls
// optimizer.step() last, after its collectives. If all workers die at once, it begins again.
template <typename Holder>
class Replicated final : public Replicas {
 public:
  Replicated(Holder module, torch::optim::Optimizer& optimizer, DataParallelOptions options = {})
      : Replicas(*module, optimizer), module_(std::move(module)), options_(std::move(options)) {}
  DataParallel<Holder>& model() { return *model_; }

 private:
  void make_model(const World& world) override {
    model_.emplace(data_parallel(module_, world, options_));
  }
  void leave() override {
    model_.reset();
    Replicas::leave();
  }
  Holder module_;
  DataParallelOptions options_;
  std::optional<DataParallel<Holder>> model_;
};

End run_steps(const World& world, State& state, const std::function<bool()>& step);

// Calls step(model), which makes a step and returns true, or returns false, on all ranks alike,
// when there is none left. The model is this generation's. Throws what step() throws, but for a
// CommError that another generation follows; CommError when the job is over.
template <typename AnyState, typename Step>
End run(const World& world, AnyState& state, Step&& step) {
  return run_steps(world, state, [&] { return static_cast<bool>(step(state.model())); });
}

}  // namespace lockstep::elastic
