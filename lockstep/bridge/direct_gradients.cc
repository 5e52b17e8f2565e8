#include "lockstep/bridge/direct_gradients.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "lockstep/base/error.h"
#include "lockstep/bridge/matrix_product.h"
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

// In a backward that may be differentiated itself (create_graph) autograd must see it.
at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return at::GradMode::is_enabled() ? a.mm(b) : matrix_product(a, b);
}

// gradient [rows, out], input [rows, in]: the weight's gradient, [out, in].
at::Tensor weight_gradient(const at::Tensor& weight, const at::Tensor& gradient,
                           const at::Tensor& input) {
  if (!at::GradMode::is_enabled())
    if (const DirectPlace* direct = free_place(weight, gradient)) {
      at::Tensor place = direct->place.detach();  // autograd takes over what nobody else refers to
      matrix_product_into(place, gradient.t(), input);
      return place;
    }
  return product(gradient.t(), input);
}

// input [rows, in] times weight [out, in] transposed, plus the bias.
struct DirectLinear : autograd::Function<DirectLinear> {
  static at::Tensor forward(autograd::AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    context->save_for_backward({input, weight});
    context->saved_data["bias"] = bias.has_value();
    const at::AutoDispatchBelowADInplaceOrView below;
    return matrix_product(input, weight.t(), bias);
  }

  static variable_list backward(autograd::AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &input = saved[0], &weight = saved[1], &gradient = gradients[0];
    variable_list result(3);
    if (context->needs_input_grad(0)) result[0] = product(gradient, weight);
    if (context->needs_input_grad(1)) result[1] = weight_gradient(weight, gradient, input);
    // A bias is the third input, if there is one; autograd itself adds up the rows.
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) result[2] = gradient;
    return result;
  }
};

// The parameter that `factor` is the transpose of, if its gradient may be born in place.
at::Tensor parameter_of(const at::Tensor& input, const at::Tensor& factor) {
  if (!at::GradMode::is_enabled() || !factor.requires_grad() || !factor.is_view()) return {};
  at::Tensor base(factor._base());
  const ParameterHook* hook = base.is_leaf() ? find_hook(base) : nullptr;
  if (!hook || !hook->direct || factor.dim() != 2 ||
      factor.const_data_ptr() != base.const_data_ptr() || factor.size(0) != base.size(1) ||
      factor.size(1) != base.size(0) || factor.stride(0) != base.stride(1) ||
      factor.stride(1) != base.stride(0) || input.layout() != at::kStrided ||
      input.scalar_type() != base.scalar_type())
    return {};
  return base;
}

// torch::nn::Linear, torch::nn::functional::linear and at::linear all become addmm(bias, input,
// weight.t()) or mm(input, weight.t()), with leading dimensions folded. These two get a kernel for
// autograd on the CPU that looks for parameters with a place. All else goes to libtorch's own,
// which is registered for every kind of autograd and so also found under AutogradOther. Casts
// (autocast) come before this, and without autograd it is not reached.
c10::DispatchKeySet libtorchs_own(c10::DispatchKeySet keys) {
  return (keys - c10::DispatchKeySet(c10::DispatchKey::AutogradFunctionality))
      .add(c10::DispatchKey::AutogradOther);
}

at::Tensor mm(c10::DispatchKeySet keys, const at::Tensor& input, const at::Tensor& factor) {
  if (const at::Tensor weight = parameter_of(input, factor); weight.defined())
    return DirectLinear::apply(input, weight, std::optional<at::Tensor>());
  return at::_ops::mm::redispatch(libtorchs_own(keys), input, factor);
}

at::Tensor addmm(c10::DispatchKeySet keys, const at::Tensor& bias, const at::Tensor& input,
                 const at::Tensor& factor, const at::Scalar& beta, const at::Scalar& alpha) {
  if (beta.equal(1) && alpha.equal(1))
    if (const at::Tensor weight = parameter_of(input, factor); weight.defined())
      return DirectLinear::apply(input, weight, std::optional<at::Tensor>(bias));
  return at::_ops::addmm::redispatch(libtorchs_own(keys), bias, input, factor, beta, alpha);
}

TORCH_LIBRARY_IMPL(aten, AutogradCPU, library) {
  library.impl("mm", TORCH_FN(mm));
  library.impl("addmm", TORCH_FN(addmm));
}

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
