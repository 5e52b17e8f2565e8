#include "lockstep/train/flat_module.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <cstring>
#include <memory>

#include "lockstep/bridge/dtypes.h"
#include "lockstep/update/optimizer.h"

namespace lockstep {
namespace {

void copy_bytes(const at::Tensor& to, const at::Tensor& from) {
  std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
}

}  // namespace

FlatModule::FlatModule(torch::nn::Module& module) {
  parameters_ = named_parameters(module);
  parameter_tensors_ = tensors_of(parameters_);
  for (NamedTensor& buffer : named_buffers(module))
    (buffer.tensor.is_floating_point() ? float_buffers_ : integer_buffers_)
        .push_back(std::move(buffer));
  float_buffer_tensors_ = tensors_of(float_buffers_);
  parameter_layout_ = make_layout(parameters_);
  buffer_layout_ = make_layout(float_buffers_);
  storage_ = at::zeros({static_cast<std::int64_t>(parameter_layout_.total)}, at::kFloat);
  weights_ = {storage_.mutable_data_ptr<float>(), parameter_layout_.total};
  move_into(std::as_writable_bytes(weights_), parameter_layout_, parameter_tensors_,
            std::make_shared<at::Tensor>(storage_));  // the module may outlive this
  for (const NamedTensor& buffer : float_buffers_)
    committed_floats_.push_back(buffer.tensor.clone());
  for (const NamedTensor& buffer : integer_buffers_)
    committed_integers_.push_back(buffer.tensor.clone());
}

std::size_t FlatModule::parameter_count() const {
  std::size_t count = 0;
  for (const ParameterLayout::Entry& entry : parameter_layout_.entries) count += entry.count;
  return count;
}

void FlatModule::restore_buffers() {
  for (std::size_t i = 0; i < float_buffers_.size(); ++i)
    copy_bytes(float_buffers_[i].tensor, committed_floats_[i]);
  for (std::size_t i = 0; i < integer_buffers_.size(); ++i)
    copy_bytes(integer_buffers_[i].tensor, committed_integers_[i]);
}

void FlatModule::collect(std::span<float> slot) {
  gather_gradients(parameter_tensors_, parameter_layout_, slot.first(gradient_size()));
  copy_into(std::as_writable_bytes(slot.subspan(gradient_size())), buffer_layout_,
            float_buffer_tensors_);
}

void FlatModule::commit_buffers(std::span<const float> sum, int count) {
  for (std::size_t i = 0; i < float_buffers_.size(); ++i) {
    const at::Tensor& tensor = float_buffers_[i].tensor;
    float* out = tensor.mutable_data_ptr<float>();
    const float* in = sum.data() + buffer_layout_.entries[i].offset;
    for (std::int64_t j = 0; j < tensor.numel(); ++j) out[j] = in[j] / static_cast<float>(count);
    copy_bytes(committed_floats_[i], tensor);
  }
  for (std::size_t i = 0; i < integer_buffers_.size(); ++i)
    copy_bytes(committed_integers_[i], integer_buffers_[i].tensor);
}

std::vector<std::span<std::byte>> FlatModule::integer_buffers() const {
  std::vector<std::span<std::byte>> spans;
  for (const NamedTensor& buffer : integer_buffers_) spans.push_back(bytes_of(buffer.tensor));
  return spans;
}

std::vector<NamedTensor> FlatModule::state() const {
  std::vector<NamedTensor> all = parameters_;
  for (std::size_t i = 0; i < float_buffers_.size(); ++i)
    all.push_back({float_buffers_[i].name, committed_floats_[i]});
  for (std::size_t i = 0; i < integer_buffers_.size(); ++i)
    all.push_back({integer_buffers_[i].name, committed_integers_[i]});
  return all;
}

bool FlatModule::is_finite() const {
  double squares = sum_of_squares(weights_);
  for (const at::Tensor& buffer : committed_floats_)
    squares +=
        sum_of_squares({buffer.const_data_ptr<float>(), static_cast<std::size_t>(buffer.numel())});
  return std::isfinite(squares);
}

}  // namespace lockstep
