#include "lockstep/bridge/optimizer_state.h"

#include <ATen/ops/empty_like.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <cstring>
#include <memory>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"

namespace lockstep {
namespace {

using torch::optim::Optimizer;

// Either writes what it is shown, or replaces it with what was written.
class Archive {
 public:
  explicit Archive(std::vector<std::byte>& to) : to_(&to) {}
  explicit Archive(std::span<const std::byte> from) : from_(from) {}
  bool reads() const { return to_ == nullptr; }
  bool at_end() const { return next_ == from_.size(); }

  template <typename T>
  void value(T& value) {
    pass(&value, sizeof value);
  }
  // `like` has its shape; it may be undefined.
  void tensor(at::Tensor& tensor, const at::Tensor& like) {
    std::uint8_t defined = tensor.defined() ? 1 : 0;
    value(defined);
    if (reads() && defined == 0) tensor = at::Tensor();
    if (defined == 0) return;
    if (reads() && (!tensor.defined() || !tensor.sizes().equals(like.sizes())))
      tensor =
          at::empty_like(like, like.options().requires_grad(false), at::MemoryFormat::Contiguous);
    const at::Tensor dense = tensor.contiguous();
    std::uint64_t bytes = dense.nbytes();
    value(bytes);
    if (bytes != dense.nbytes()) throw broken();
    pass(dense.mutable_data_ptr(), bytes);
    if (reads() && !dense.is_same(tensor)) tensor.copy_(dense);
  }
  static Error broken() {
    return Error("the optimizer's state is of another optimizer or of other parameters");
  }

 private:
  void pass(void* memory, std::size_t bytes) {
    if (!reads()) {
      const auto* begin = static_cast<const std::byte*>(memory);
      to_->insert(to_->end(), begin, begin + bytes);
      return;
    }
    if (!in_bounds(next_, bytes, from_.size())) throw broken();
    if (bytes != 0) std::memcpy(memory, from_.data() + next_, bytes);
    next_ += bytes;
  }
  std::vector<std::byte>* to_ = nullptr;
  std::span<const std::byte> from_;
  std::size_t next_ = 0;
};

void pass(Archive& archive, torch::optim::SGDParamState& state, const at::Tensor& like) {
  archive.tensor(state.momentum_buffer(), like);
}
template <typename AdamState>
void pass_adam(Archive& archive, AdamState& state, const at::Tensor& like) {
  archive.value(state.step());
  archive.tensor(state.exp_avg(), like);
  archive.tensor(state.exp_avg_sq(), like);
  archive.tensor(state.max_exp_avg_sq(), like);
}
void pass(Archive& archive, torch::optim::AdamParamState& state, const at::Tensor& like) {
  pass_adam(archive, state, like);
}
void pass(Archive& archive, torch::optim::AdamWParamState& state, const at::Tensor& like) {
  pass_adam(archive, state, like);
}
void pass(Archive& archive, torch::optim::AdagradParamState& state, const at::Tensor& like) {
  archive.value(state.step());
  archive.tensor(state.sum(), like);
}
void pass(Archive& archive, torch::optim::RMSpropParamState& state, const at::Tensor& like) {
  archive.value(state.step());
  archive.tensor(state.square_avg(), like);
  archive.tensor(state.momentum_buffer(), like);
  archive.tensor(state.grad_avg(), like);
}

// An LBFGS's state belongs to no single parameter.
template <typename ParamState>
void pass_all(Archive& archive, Optimizer& optimizer) {
  for (auto& group : optimizer.param_groups()) {
    double lr = group.options().get_lr();
    archive.value(lr);
    if (archive.reads()) group.options().set_lr(lr);
    for (const at::Tensor& parameter : group.params()) {
      auto& states = optimizer.state();
      const auto found = states.find(parameter.unsafeGetTensorImpl());
      std::uint8_t has_state = found != states.end() ? 1 : 0;
      archive.value(has_state);
      if (has_state == 0) {
        if (found != states.end()) states.erase(found);
        continue;
      }
      auto& state = states[parameter.unsafeGetTensorImpl()];
      if (!state) state = std::make_unique<ParamState>();
      pass(archive, static_cast<ParamState&>(*state), parameter);
    }
  }
}

void pass_all(Archive& archive, Optimizer& optimizer) {
  using namespace torch::optim;
  if (dynamic_cast<SGD*>(&optimizer) != nullptr)
    pass_all<SGDParamState>(archive, optimizer);
  else if (dynamic_cast<AdamW*>(&optimizer) != nullptr)
    pass_all<AdamWParamState>(archive, optimizer);
  else if (dynamic_cast<Adam*>(&optimizer) != nullptr)
    pass_all<AdamParamState>(archive, optimizer);
  else if (dynamic_cast<Adagrad*>(&optimizer) != nullptr)
    pass_all<AdagradParamState>(archive, optimizer);
  else if (dynamic_cast<RMSprop*>(&optimizer) != nullptr)
    pass_all<RMSpropParamState>(archive, optimizer);
  else
    throw ConfigError("the state of this optimizer cannot be given to another worker",
                      "SGD, Adam, AdamW, Adagrad or RMSprop");
}

}  // namespace

std::vector<std::byte> optimizer_state(Optimizer& optimizer) {
  std::vector<std::byte> bytes;
  Archive archive(bytes);
  pass_all(archive, optimizer);
  return bytes;
}

void set_optimizer_state(Optimizer& optimizer, std::span<const std::byte> bytes) {
  Archive archive(bytes);
  pass_all(archive, optimizer);
  if (!archive.at_end()) throw Archive::broken();
}

}  // namespace lockstep
