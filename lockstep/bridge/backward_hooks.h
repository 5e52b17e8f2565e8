// What happens while backward() runs, as calls on the thread that runs it: one before the pass's
// first gradient, one for each parameter whose gradient of this pass is in its .grad, and one at
// the end, before backward() returns. What a call throws leaves backward().
//
// A pass that fails has no end; the next one begins anew. torch::autograd::grad() is no pass. A
// pass inside another (backward() called by a node of the graph) is refused with a ConfigError that
// names a parameter where there is one: which gradients belong to which would not be known.
//
// Owner: whoever holds the BackwardHooks; the calls go with it. Threads: as for the module.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "lockstep/bridge/flat_parameters.h"

namespace lockstep {

class BackwardHooks {
 public:
  struct Calls {
    std::function<void()> begin = {};
    std::function<void(std::size_t parameter)> gradient = {};  // its index
    std::function<void()> end = {};
  };
  // Watches the parameters, also those that require no gradient yet. Throws ConfigError naming one
  // whose gradient somebody watches already: two owners would both change it.
  BackwardHooks(std::span<const NamedTensor> parameters, Calls calls);
  ~BackwardHooks();
  BackwardHooks(const BackwardHooks&) = delete;
  BackwardHooks& operator=(const BackwardHooks&) = delete;

 private:
  struct State;
  std::vector<at::Tensor> watched_;
  std::shared_ptr<State> state_;
};

}  // namespace lockstep
