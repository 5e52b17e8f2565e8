// The state of one of libtorch's own optimizers as bytes, for another process that has the same
// module and optimizer: what the first step makes is made where it is missing. One thread.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace torch::optim {
class Optimizer;
}

namespace lockstep {

// Of SGD, Adam, AdamW, Adagrad and RMSprop, learning rates included. Throws ConfigError for others.
std::vector<std::byte> optimizer_state(torch::optim::Optimizer& optimizer);
// Throws Error if the bytes are not those of such an optimizer over such parameters.
void set_optimizer_state(torch::optim::Optimizer& optimizer, std::span<const std::byte> bytes);

}  // namespace lockstep
