#include "lockstep/bridge/direct_gradients.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/linear_native.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "lockstep/base/error.h"
#include "lockstep/bridge/parameter_hook.h"

namespace lockstep {
namespace {

namespace autograd = torch::autograd;
using autograd::variable_list;

bool pays(const at::Tensor& parameter) {
  return parameter.dim() == 2 && parameter.numel() >= kDirectElements &&
         parameter.layout() == at::kStrided && parameter.device().is_cpu() &&
         parameter.is_contiguous();
}

// The place that this backward may write the weight's gradient to; null: a buffer, as usual.
DirectPlace* free_place(const at::Tensor& weight, const at::Tensor& gradient) {
  ParameterHook* hook = find_hook(weight);
  if (!hook || !hook->direct || !hook->direct->place.defined()) return nullptr;
  const bool accumulates = autograd::get_current_graph_task_exec_info() == nullptr ||
                           autograd::get_current_graph_task_exec_info()->empty();
  const int pass = autograd::get_current_graph_task_id();
  DirectPlace& direct = *hook->direct;
  if (!accumulates || direct.pass == pass || weight.grad().defined() ||
      !autograd::impl::hooks(weight).empty() || direct.place.storage().use_count() != 1 ||
      direct.place.scalar_type() != gradient.scalar_type())
    return nullptr;
  direct.pass = pass;
  return &direct;
}

// gradient [rows, out], input [rows, in]: the weight's gradient, [out, in].
at::Tensor weight_gradient(const at::Tensor& weight, const at::Tensor& gradient,
                           const at::Tensor& input) {
  if (!at::GradMode::is_enabled())
    if (const DirectPlace* direct = free_place(weight, gradient)) {
      at::Tensor place = direct->place.detach();  // autograd takes over what nobody else refers to
      at::mm_out(place, gradient.t(), input);
      return place;
    }
  return gradient.t().mm(input);
}

struct DirectLinear : autograd::Function<DirectLinear> {
  static at::Tensor forward(autograd::AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    context->save_for_backward({input, weight});
    context->saved_data["bias"] = bias && bias->defined();
    const at::AutoDispatchBelowADInplaceOrView below;
    return at::linear(input, weight, bias);
  }

  static variable_list backward(autograd::AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &input = saved[0], &weight = saved[1];
    const at::Tensor gradient = gradients[0].reshape({-1, weight.size(0)});
    variable_list result(3);
    if (context->needs_input_grad(0)) result[0] = gradient.mm(weight).reshape_as(input);
    if (context->needs_input_grad(1))
      result[1] = weight_gradient(weight, gradient, input.reshape({-1, weight.size(1)}));
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2))
      result[2] = gradient.sum(0);
    return result;
  }
};

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  if (at::GradMode::is_enabled() && weight.requires_grad() && input.dim() >= 2 &&
      input.layout() == at::kStrided && input.scalar_type() == weight.scalar_type() &&
      (!bias || !bias->defined() || bias->dim() == 1))
    if (const ParameterHook* hook = find_hook(weight); hook && hook->direct)
      return DirectLinear::apply(input, weight, bias);
  return at::native::linear(input, weight, bias);
}

// linear() is a composition of other operators; here it gets a kernel of its own, above them. Casts
// (autocast) come before it, and without autograd (inference mode) it is not reached. For every
// weight without a place it is the composition again.
TORCH_LIBRARY_IMPL(aten, AutogradCPU, library) { library.impl("linear", TORCH_FN(linear)); }

}  // namespace

DirectGradients::DirectGradients(std::span<const at::Tensor> parameters)
    : parameters_(parameters.size()) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (!pays(parameters[i])) continue;
    ParameterHook* hook = find_or_add_hook(parameters[i]);
    if (!hook || hook->direct) continue;  // somebody else's: a buffer, as usual
    hook->direct = &places_.emplace_back();
    weights_.push_back({i, parameters[i], hook->direct});
  }
}

DirectGradients::~DirectGradients() {
  for (const Weight& one : weights_)
    if (ParameterHook* hook = find_hook(one.parameter)) {
      hook->direct = nullptr;
      drop_hook(one.parameter);
    }
}

void DirectGradients::set_places(std::span<const at::Tensor> places) {
  LOCKSTEP_CHECK(places.size() == parameters_, "one place a parameter");
  for (const Weight& one : weights_) {
    const at::Tensor& place = places[one.index];
    LOCKSTEP_CHECK(
        !place.defined() || (place.sizes() == one.parameter.sizes() && place.is_contiguous() &&
                             place.scalar_type() == one.parameter.scalar_type()),
        "a place must have its parameter's shape and dtype");
    one.direct->place = place;
  }
}

void DirectGradients::set_places(std::span<std::byte> memory, const ParameterLayout& layout) {
  LOCKSTEP_CHECK(layout.entries.size() == parameters_, "one place a parameter");
  std::vector<at::Tensor> places(parameters_);
  for (const Weight& one : weights_) places[one.index] = view_of(memory, layout, one.index);
  set_places(places);
}

}  // namespace lockstep
