#include "lockstep/parallel/elastic.h"

#include <ATen/Context.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/bridge/dtypes.h"
#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/bridge/optimizer_state.h"
#include "lockstep/cluster/fault_injector.h"
#include "lockstep/observe/event.h"

namespace lockstep::elastic {

struct Replicas::Impl {
  torch::nn::Module& module;
  torch::optim::Optimizer& optimizer;
  std::vector<at::Tensor> parameters, buffers;
  // As they were when the step began. Parameters are not copied: their versions tell whether they
  // have changed since, which they do at a step's very end alone.
  std::vector<std::uint32_t> versions;
  std::vector<at::Tensor> buffers_before;
  bool in_step = false;
  bool is_new = true;         // it has not been in a generation
  bool is_receiving = false;  // another's values: a part of them, if the giver dies

  bool is_whole() const {
    if (is_receiving) return false;
    for (std::size_t i = 0; in_step && i < parameters.size(); ++i)
      if (parameters[i]._version() != versions[i]) return false;
    return true;
  }
  void give(const World& world, int source) {
    for (const auto& tensors : {parameters, buffers})
      for (const at::Tensor& tensor : tensors)
        world.group().broadcast(bytes_of(tensor), Dtype::uint8, source, {.tag = "replica"});
    std::vector<std::byte> state;
    if (world.rank() == source) state = optimizer_state(optimizer);
    std::uint64_t bytes = state.size();
    world.group().broadcast(std::as_writable_bytes(std::span(&bytes, 1)), Dtype::int64, source,
                            {.tag = "replica"});
    state.resize(bytes);
    if (bytes != 0) world.group().broadcast(state, Dtype::uint8, source, {.tag = "replica"});
    if (world.rank() != source) set_optimizer_state(optimizer, state);
  }
};

Replicas::Replicas(torch::nn::Module& module, torch::optim::Optimizer& optimizer)
    : impl_(new Impl{.module = module,
                     .optimizer = optimizer,
                     .parameters = tensors_of(named_parameters(module)),
                     .buffers = tensors_of(named_buffers(module)),
                     .versions = {},
                     .buffers_before = {}}) {}
Replicas::~Replicas() = default;

std::string Replicas::enter(const World& world) {
  Impl& mine = *impl_;
  constexpr std::int64_t kTorn = -1, kNew = -2;
  const std::int64_t step = !mine.is_whole() ? kTorn
                            : mine.is_new    ? kNew
                                             : static_cast<std::int64_t>(step_);
  if (std::exchange(mine.in_step, false))
    for (std::size_t i = 0; i < mine.buffers.size(); ++i)
      std::ranges::copy(bytes_of(mine.buffers_before[i]), bytes_of(mine.buffers[i]).begin());
  std::vector<std::int64_t> steps(static_cast<std::size_t>(world.size()));
  world.group().all_gather(std::as_bytes(std::span(&step, 1)),
                           std::as_writable_bytes(std::span(steps)), Dtype::int64,
                           {.tag = "the newest replica"});
  const auto newest = std::ranges::max_element(steps);
  if (*newest == kTorn)
    throw Error(
        "every worker's replica was being changed when the last generation ended; hint: "
        "optimizer.step() comes last in a step, after its collectives");
  const auto source = static_cast<int>(newest - steps.begin());
  mine.is_receiving = step != *newest;  // else what it has is the same, bit for bit
  mine.give(world, source);
  mine.is_receiving = false;
  mine.is_new = false;
  step_ = static_cast<std::uint64_t>(std::max<std::int64_t>(*newest, 0));
  make_model(world);
  return *newest == kNew ? "start" : "peer";
}

// Gradients may lie in the group's memory.
void Replicas::leave() { impl_->optimizer.zero_grad(); }

void Replicas::begin_step() {
  Impl& mine = *impl_;
  mine.versions.clear();
  for (const at::Tensor& one : mine.parameters)
    mine.versions.push_back(static_cast<std::uint32_t>(one._version()));
  mine.buffers_before.clear();
  for (const at::Tensor& one : mine.buffers) mine.buffers_before.push_back(one.detach().clone());
  mine.in_step = true;
}

State::Agreement Replicas::end_step(const World& world) {
  impl_->in_step = false;
  ++step_;
  if (!world.is_elastic()) return {};
  // All take up the next generation together: when each has heard of it.
  std::int32_t flags[2] = {world.next_generation_is_due() ? 0 : 1, world.stop_requested() ? 1 : 0};
  world.group().all_reduce(std::as_writable_bytes(std::span(flags)), Dtype::int32, Reduction::max,
                           {.tag = "the end of a step"});
  return {flags[0] == 0, flags[1] != 0};
}

End run_steps(const World& world, State& state, const std::function<bool()>& step) {
  world.declare_elastic();
  world.join();
  FaultInjector faults(world);
  bool in_step = false, is_first = true;
  const auto in_this_generation = [&]() -> std::optional<End> {
    const std::uint64_t before = state.step_;
    const std::string source = state.enter(world);
    std::int32_t redone = in_step && state.step_ == before ? 1 : 0;
    nlohmann::json recovered;
    if (world.generation() > 0) {
      world.group().all_reduce(std::as_writable_bytes(std::span(&redone, 1)), Dtype::int32,
                               Reduction::max, {.tag = "what is done again"});
      if (world.rank() == 0)
        world.events().emit({{"event", "entered"}, {"generation", world.generation()}});
      recovered = {{"event", "recovered"},
                   {"generation", world.generation()},
                   {"steps_redone", redone},
                   {"source", source}};
    }
    for (;;) {
      at::manual_seed(mix({state.step_, static_cast<std::uint64_t>(world.rank())}));
      in_step = true;
      state.begin_step();
      faults.at(Point::start, state.step_ + 1);
      if (!step()) break;
      const State::Agreement agreed = state.end_step(world);
      in_step = false;
      world.made_progress();
      faults.at(Point::committed, state.step_);
      // The first generation has begun, too: until then it is not changed.
      if (world.rank() == 0 && world.generation() == 0 && std::exchange(is_first, false))
        world.events().emit({{"event", "first_step"},
                             {"rank", 0},
                             {"clock", seconds(Clock::now().time_since_epoch())}});
      if (world.rank() == 0 && !recovered.is_null()) {
        recovered["step"] = state.step_;
        recovered["clock"] = seconds(Clock::now().time_since_epoch());
        world.events().emit(std::exchange(recovered, nullptr));
      }
      if (agreed.stop) return End::stopped;
      if (agreed.next_generation) return std::nullopt;
    }
    if (world.is_elastic()) world.group().barrier({.tag = "the end"});
    return End::done;
  };
  std::optional<End> end;
  const auto work = [&] { return (end = in_this_generation()).has_value(); };
  return world.in_generations(work, [&] { state.leave(); }) ? *end : End::released;
}

}  // namespace lockstep::elastic
