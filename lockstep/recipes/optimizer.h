// A job's optimizer as the update layer knows it, and as libtorch's own. Pure; any thread.
#pragma once

#include <memory>
#include <vector>

#include "lockstep/job/job.h"
#include "lockstep/update/optimizer.h"

namespace at {
class Tensor;
}
namespace torch::optim {
class Optimizer;
}

namespace lockstep {

// Neither for "closed_form", which takes no steps.
OptimizerOptions optimizer_options(const OptimizerSettings& settings);
std::unique_ptr<torch::optim::Optimizer> torch_optimizer(const OptimizerSettings& settings,
                                                         std::vector<at::Tensor> parameters);

}  // namespace lockstep
