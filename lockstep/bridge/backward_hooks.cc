#include "lockstep/bridge/backward_hooks.h"

#include <fmt/format.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include "lockstep/base/error.h"

namespace lockstep {

namespace autograd = torch::autograd;

struct BackwardEnd::State {
  std::function<void()> at_end;
  // The pass whose end is already asked for. An id, not a flag: a pass that fails never ends.
  int pass = -1;

  void ask(const std::shared_ptr<State>& self) {
    const int current = autograd::get_current_graph_task_id();
    if (current == pass) return;
    pass = current;
    autograd::Engine::get_default_engine().queue_callback([weak = std::weak_ptr(self)] {
      if (const auto state = weak.lock()) state->at_end();
    });
  }

  struct Hook final : autograd::PostAccumulateGradHook {
    explicit Hook(std::shared_ptr<State> s) : state(std::move(s)) {}
    void operator()(const autograd::Variable&) override { state->ask(state); }
    std::shared_ptr<State> state;
  };
};

BackwardEnd::BackwardEnd(std::span<const NamedTensor> parameters, std::function<void()> at_end)
    : state_(std::make_shared<State>()) {
  state_->at_end = std::move(at_end);
  for (const auto& [name, tensor] : parameters) {
    if (autograd::impl::post_acc_grad_hooks(tensor))
      throw ConfigError(
          fmt::format("the gradient of parameter '{}' already has a post-accumulate hook", name),
          "wrap a module in data_parallel once, and keep the result");
    watched_.push_back(tensor);
  }
  for (const at::Tensor& tensor : watched_)
    autograd::impl::set_post_acc_grad_hooks(tensor, std::make_unique<State::Hook>(state_));
}

BackwardEnd::~BackwardEnd() {
  for (const at::Tensor& tensor : watched_)
    autograd::impl::set_post_acc_grad_hooks(tensor, nullptr);
}

}  // namespace lockstep
