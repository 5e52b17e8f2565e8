// Losses by name, and what "right" means for each kind of target.
#pragma once

#include "lockstep/job/job.h"
#include "lockstep/train/batches.h"
#include "lockstep/train/task.h"

namespace lockstep {

struct Objective {
  TargetForm target_form = TargetForm::classes;
  std::int64_t outputs = 1;  // the model's
  std::function<LossValue(const at::Tensor&, const at::Tensor&)> loss;
  std::function<std::int64_t(const at::Tensor&, const at::Tensor&)>
      correct;  // empty for regression
};

// class_count 0: regression. Throws ConfigError where the loss does not fit the data.
Objective make_objective(const LossSettings& settings, std::int64_t class_count);

}  // namespace lockstep
