#include "lockstep/parallel/local_sgd.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/bridge/dtypes.h"
#include "lockstep/parallel/same_module.h"
#include "lockstep/parallel/wire_group.h"

namespace lockstep {

struct LocalSteps::State {
  // Tensors of fp32 as one flat one.
  struct Flat {
    ParameterLayout layout;
    std::vector<at::Tensor> tensors;

    explicit Flat(const std::vector<NamedTensor>& named)
        : layout(make_layout(named)), tensors(tensors_of(named)) {}
    at::Tensor zeros() const { return at::zeros({static_cast<std::int64_t>(layout.total)}); }
    void read(const at::Tensor& flat) const { copy_into(bytes_of(flat), layout, tensors); }
    void write(const at::Tensor& flat) const {
      for (std::size_t i = 0; i < tensors.size(); ++i)
        tensors[i].copy_(view_of(bytes_of(flat), layout, i));
    }
  };

  World world;
  int warmup_steps;
  DiLoCoOptions options;
  std::unique_ptr<CompressedGroup> averages;
  Flat parameters, buffers;
  at::Tensor agreed, change, velocity;  // flat; no velocity without momentum
  at::Tensor averaged_buffers;          // flat
  at::Tensor steps = at::zeros({}, at::kLong);
  std::int64_t met = 0;  // after so many steps

  State(torch::nn::Module& module, const World& w, int warmup, const DiLoCoOptions& o,
        const std::vector<NamedTensor>& float_buffers)
      : world(w),
        warmup_steps(warmup),
        options(o),
        averages(make_wire_group(w, o.wire_format)),
        parameters(named_parameters(module)),
        buffers(float_buffers),
        agreed(parameters.zeros()),
        change(parameters.zeros()),
        averaged_buffers(buffers.zeros()) {
    if (options.outer_momentum != 0) velocity = parameters.zeros();
    parameters.read(agreed);
  }

  bool is_plain_average() const { return !velocity.defined() && options.outer_lr == 1; }
  std::int64_t& made() { return *steps.mutable_data_ptr<std::int64_t>(); }

  void meet() {
    const at::NoGradGuard no_grad;
    met = made();
    if (world.size() == 1 && is_plain_average()) return parameters.read(agreed);
    parameters.read(change);
    change.sub_(agreed);
    averages->all_reduce(bytes_of(change), Dtype::float32, Reduction::mean,
                         {.tag = "change of the parameters"});
    buffers.read(averaged_buffers);
    if (buffers.layout.total > 0)
      world.group().all_reduce(bytes_of(averaged_buffers), Dtype::float32, Reduction::mean,
                               {.tag = "buffers"});
    // Uphill: a change is the negative of a gradient.
    if (velocity.defined()) velocity.mul_(options.outer_momentum).add_(change);
    if (velocity.defined() && options.nesterov) change.add_(velocity, options.outer_momentum);
    agreed.add_(velocity.defined() && !options.nesterov ? velocity : change, options.outer_lr);
    parameters.write(agreed);
    buffers.write(averaged_buffers);
  }
};

LocalSteps::LocalSteps(torch::nn::Module& module, const World& world, int warmup_steps,
                       const DiLoCoOptions& options) {
  const auto check = [](bool holds, std::string_view name, double value, const char* hint) {
    if (!holds)
      throw ConfigError(fmt::format("local steps: {} {} is out of range", name, value), hint);
  };
  check(options.sync_every >= 1, "sync_every", options.sync_every, "a number of steps such as 50");
  check(warmup_steps >= 0, "warmup_steps", warmup_steps, "a number of steps, or 0");
  check(options.outer_lr > 0, "outer_lr", options.outer_lr, "a rate such as 0.7");
  check(options.outer_momentum >= 0 && options.outer_momentum < 1, "outer_momentum",
        options.outer_momentum, "a number from 0 to below 1, such as 0.9");
  std::vector<NamedTensor> all = named_buffers(module), floats;
  check_same_module(world.group(), named_parameters(module), all);
  broadcast_values(world.group(), named_parameters(module));
  broadcast_values(world.group(), all);
  std::ranges::copy_if(all, std::back_inserter(floats),
                       [](const auto& one) { return one.tensor.scalar_type() == at::kFloat; });
  state_ = std::make_unique<State>(module, world, warmup_steps, options, floats);
}

LocalSteps::~LocalSteps() = default;

LocalSgd::LocalSgd(torch::nn::Module& module, const World& world, const LocalSgdOptions& options)
    : LocalSteps(module, world, options.warmup_steps,
                 {.sync_every = options.sync_every,
                  .outer_lr = 1,  // the average itself
                  .outer_momentum = 0,
                  .wire_format = options.wire_format}) {}

bool LocalSteps::step() {
  State& state = *state_;
  const std::int64_t made = ++state.made();
  if (made > state.warmup_steps && (made - state.warmup_steps) % state.options.sync_every != 0)
    return false;
  state.meet();
  return true;
}

void LocalSteps::synchronize() {
  if (state_->met != state_->made()) state_->meet();
}

std::vector<NamedTensor> LocalSteps::state() const {
  std::vector<NamedTensor> tensors = {{"agreed", state_->agreed}, {"steps", state_->steps}};
  if (state_->velocity.defined()) tensors.push_back({"velocity", state_->velocity});
  return tensors;
}

CompressedGroup::Errors& LocalSteps::wire_errors() { return state_->averages->errors(); }

}  // namespace lockstep
