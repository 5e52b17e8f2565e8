#include "lockstep/bridge/parameter_hook.h"

#include <torch/csrc/autograd/variable.h>

namespace lockstep {

namespace impl = torch::autograd::impl;

ParameterHook* find_hook(const at::Tensor& parameter) {
  if (!impl::get_autograd_meta(parameter)) return nullptr;
  return dynamic_cast<ParameterHook*>(impl::post_acc_grad_hooks(parameter).get());
}

ParameterHook* find_or_add_hook(const at::Tensor& parameter) {
  if (!impl::materialize_autograd_meta(parameter)) return nullptr;
  if (!impl::post_acc_grad_hooks(parameter))
    impl::set_post_acc_grad_hooks(parameter, std::make_unique<ParameterHook>());
  return find_hook(parameter);
}

void drop_hook(const at::Tensor& parameter) {
  const ParameterHook* hook = find_hook(parameter);
  if (hook && !hook->on_gradient && !hook->direct)
    impl::set_post_acc_grad_hooks(parameter, nullptr);
}

}  // namespace lockstep
