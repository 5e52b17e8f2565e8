// "Call me at the end of this backward": one call on the thread that runs backward(), after every
// gradient of the pass is in its .grad and before backward() returns. What the call throws leaves
// backward().
//
// Owner: whoever holds the BackwardEnd; the hooks go with it. Threads: as for the module.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "lockstep/bridge/flat_parameters.h"

namespace lockstep {

class BackwardEnd {
 public:
  // Watches the parameters, also those that require no gradient yet. Throws ConfigError naming one
  // whose gradient somebody watches already: two owners would both change it.
  BackwardEnd(std::span<const NamedTensor> parameters, std::function<void()> at_end);
  ~BackwardEnd();
  BackwardEnd(const BackwardEnd&) = delete;
  BackwardEnd& operator=(const BackwardEnd&) = delete;

 private:
  struct State;
  std::vector<at::Tensor> watched_;
  std::shared_ptr<State> state_;
};

}  // namespace lockstep
