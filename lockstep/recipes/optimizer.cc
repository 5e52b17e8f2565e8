#include "lockstep/recipes/optimizer.h"

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

}  // namespace lockstep
