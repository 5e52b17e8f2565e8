#include "lockstep/bridge/backward_hooks.h"

#include <fmt/format.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include "lockstep/base/error.h"
#include "lockstep/bridge/parameter_hook.h"

namespace lockstep {

namespace autograd = torch::autograd;

namespace {

[[noreturn]] void refuse_nested(const std::string& what) {
  throw ConfigError(
      fmt::format("{} while another backward() was running: gradients of a nested backward() "
                  "cannot be told from those of the outer one",
                  what),
      "take the inner derivatives with torch::autograd::grad");
}

}  // namespace

struct BackwardHooks::State {
  Calls calls;
  std::vector<std::string> names;
  // The pass in progress. Ids only grow, so that a smaller one is a pass that was interrupted.
  int pass = -1;

  void on_gradient(const std::shared_ptr<State>& self, std::size_t parameter) {
    const int current = autograd::get_current_graph_task_id();
    if (current < pass)
      refuse_nested(fmt::format("parameter '{}' got a gradient", names[parameter]));
    if (current > pass) {
      pass = current;
      if (calls.begin) calls.begin();
      autograd::Engine::get_default_engine().queue_callback([weak = std::weak_ptr(self), current] {
        const auto state = weak.lock();
        if (!state) return;
        if (state->pass != current) refuse_nested("a backward() ended");
        if (state->calls.end) state->calls.end();
      });
    }
    if (calls.gradient) calls.gradient(parameter);
  }
};

BackwardHooks::BackwardHooks(std::span<const NamedTensor> parameters, Calls calls)
    : state_(std::make_shared<State>()) {
  state_->calls = std::move(calls);
  for (const auto& [name, tensor] : parameters) {
    const ParameterHook* hook = find_or_add_hook(tensor);
    if (!hook || hook->on_gradient) {
      for (const NamedTensor& one : parameters) drop_hook(one.tensor);
      throw ConfigError(
          fmt::format("the gradient of parameter '{}' already has a post-accumulate hook", name),
          "wrap a module in data_parallel once, and keep the result");
    }
  }
  for (const auto& [name, tensor] : parameters) {
    find_hook(tensor)->on_gradient = [state = state_, index = watched_.size()] {
      state->on_gradient(state, index);
    };
    watched_.push_back(tensor);
    state_->names.push_back(name);
  }
}

BackwardHooks::~BackwardHooks() {
  for (const at::Tensor& tensor : watched_)
    if (ParameterHook* hook = find_hook(tensor)) {
      hook->on_gradient = nullptr;
      drop_hook(tensor);
    }
}

}  // namespace lockstep
