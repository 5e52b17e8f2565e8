// Models by name: mlp, cnn, resnet18 and gpt.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "lockstep/job/job.h"

namespace torch::nn {
class Module;
}

namespace lockstep {

struct Model {
  std::shared_ptr<torch::nn::Module> module;
  // [n, sample…] -> [n, outputs]; gpt: [n, bytes] int64 -> [n, bytes, outputs]
  std::function<at::Tensor(const at::Tensor&)> forward;
};

// Initialised from `seed` alone: the same weights on every rank. sample_shape without the batch:
// {28, 28} or {columns}. Throws ConfigError where the model does not fit the samples (cnn needs
// images of at least 4 × 4). gpt's bytes may be fewer than its context.
Model make_model(const ModelSettings& settings, const std::vector<std::int64_t>& sample_shape,
                 std::int64_t outputs, std::uint64_t seed);

}  // namespace lockstep
