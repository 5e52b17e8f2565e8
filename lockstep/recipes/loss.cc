#include "lockstep/recipes/loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/huber_loss.h>
#include <ATen/ops/mse_loss.h>
#include <fmt/format.h>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

double rows(const at::Tensor& output) { return static_cast<double>(output.size(0)); }

Objective cross_entropy(std::int64_t class_count, bool one_hot) {
  Objective objective;
  objective.target_form = one_hot ? TargetForm::one_hot : TargetForm::classes;
  objective.outputs = class_count;
  objective.loss = [](const at::Tensor& output, const at::Tensor& target) {
    return LossValue{at::cross_entropy_loss(output, target, {}, at::Reduction::Sum), rows(output)};
  };
  objective.correct = [one_hot](const at::Tensor& output, const at::Tensor& target) {
    const at::Tensor expected = one_hot ? target.argmax(1) : target;
    return output.argmax(1).eq(expected).sum().item<std::int64_t>();
  };
  return objective;
}

// A linear support vector machine's loss: max(0, 1 - y·f(x)), y = -1 for class 0 and +1 for
// class 1.
Objective hinge() {
  Objective objective;
  objective.target_form = TargetForm::signs;
  objective.loss = [](const at::Tensor& output, const at::Tensor& target) {
    return LossValue{at::clamp_min(1 - target * output, 0).sum(), rows(output)};
  };
  objective.correct = [](const at::Tensor& output, const at::Tensor& target) {
    return output.gt(0).eq(target.gt(0)).sum().item<std::int64_t>();
  };
  return objective;
}

Objective regression(const LossSettings& settings) {
  Objective objective;
  objective.target_form = TargetForm::values;
  if (settings.name == "huber")
    objective.loss = [delta = settings.delta](const at::Tensor& output, const at::Tensor& target) {
      return LossValue{at::huber_loss(output, target, at::Reduction::Sum, delta), rows(output)};
    };
  else
    objective.loss = [](const at::Tensor& output, const at::Tensor& target) {
      return LossValue{at::mse_loss(output, target, at::Reduction::Sum), rows(output)};
    };
  return objective;
}

}  // namespace

Objective make_objective(const LossSettings& settings, std::int64_t class_count) {
  const bool for_classes = settings.name == "cross_entropy" || settings.name == "hinge";
  if (for_classes != (class_count > 0))
    throw ConfigError(fmt::format("loss.name: {} does not fit {}", settings.name,
                                  class_count > 0 ? "classes" : "numbers to predict"),
                      class_count > 0 ? "cross_entropy or hinge" : "mean_squared_error or huber");
  if (settings.name == "hinge") {
    if (class_count != 2)
      throw ConfigError(
          fmt::format("loss.name: hinge separates two classes, the data has {}", class_count),
          "cross_entropy takes any number of classes");
    return hinge();
  }
  if (settings.name == "cross_entropy") return cross_entropy(class_count, settings.one_hot);
  return regression(settings);
}

}  // namespace lockstep
