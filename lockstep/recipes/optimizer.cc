#include "lockstep/recipes/optimizer.h"

#include <ATen/core/Tensor.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <tuple>

namespace lockstep {

OptimizerOptions optimizer_options(const OptimizerSettings& settings) {
  OptimizerOptions options{.lr = settings.lr,
                           .betas = {settings.beta1, settings.beta2},
                           .eps = settings.eps,
                           .weight_decay = settings.weight_decay};
  if (settings.name == "adamw") {
    options.kind = OptimizerKind::adamw;
  } else if (settings.name != "adam") {
    options.kind = OptimizerKind::sgd;
    options.momentum = settings.name == "sgd" ? 0.0 : settings.momentum;
    options.nesterov = settings.name == "nesterov";
  }
  return options;
}

std::unique_ptr<torch::optim::Optimizer> torch_optimizer(const OptimizerSettings& settings,
                                                         std::vector<at::Tensor> parameters) {
  const OptimizerOptions options = optimizer_options(settings);
  const auto adam = [&](auto made) {
    made.betas(std::tuple(options.betas.first, options.betas.second)).eps(options.eps);
    return made.weight_decay(options.weight_decay);
  };
  if (options.kind == OptimizerKind::adam)
    return std::make_unique<torch::optim::Adam>(std::move(parameters),
                                                adam(torch::optim::AdamOptions(options.lr)));
  if (options.kind == OptimizerKind::adamw)
    return std::make_unique<torch::optim::AdamW>(std::move(parameters),
                                                 adam(torch::optim::AdamWOptions(options.lr)));
  return std::make_unique<torch::optim::SGD>(std::move(parameters),
                                             torch::optim::SGDOptions(options.lr)
                                                 .momentum(options.momentum)
                                                 .nesterov(options.nesterov)
                                                 .weight_decay(options.weight_decay));
}

}  // namespace lockstep
