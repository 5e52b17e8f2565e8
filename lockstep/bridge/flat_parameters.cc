#include "lockstep/bridge/flat_parameters.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <unordered_set>
#include <utility>

#include "lockstep/base/error.h"
#include "lockstep/bridge/dtypes.h"

namespace lockstep {
namespace {

constexpr std::size_t kAlignment = 64;  // bits of a product may depend on it: fixed

std::vector<NamedTensor> without_twins(
    const torch::OrderedDict<std::string, at::Tensor>& dictionary) {
  std::vector<NamedTensor> unique;
  std::unordered_set<const void*> seen;
  for (const auto& item : dictionary)
    if (item.value().defined() && seen.insert(item.value().unsafeGetTensorImpl()).second)
      unique.push_back({item.key(), item.value()});
  return unique;
}

void check_memory(std::span<const std::byte> memory, const ParameterLayout& layout,
                  std::size_t tensors) {
  LOCKSTEP_CHECK(memory.size() == layout.bytes() && tensors == layout.entries.size(),
                 "memory and tensors must fit the layout");
  LOCKSTEP_CHECK(reinterpret_cast<std::uintptr_t>(memory.data()) % kAlignment == 0,
                 "flat memory must be 64-byte aligned");
}

std::span<std::byte> place_of(std::span<std::byte> memory, const ParameterLayout& layout,
                              std::size_t entry) {
  const std::size_t size = size_of(layout.dtype);
  return memory.subspan(layout.entries[entry].offset * size, layout.entries[entry].count * size);
}

// From the end of an entry to the start of the next.
void zero_padding_after(std::span<std::byte> memory, const ParameterLayout& layout,
                        std::size_t entry) {
  const ParameterLayout::Entry& e = layout.entries[entry];
  const std::size_t next =
      entry + 1 < layout.entries.size() ? layout.entries[entry + 1].offset : layout.total;
  const std::size_t size = size_of(layout.dtype);
  const std::size_t end = e.offset + e.count;
  if (next > end) std::memset(memory.data() + end * size, 0, (next - end) * size);
}

}  // namespace

void copy_into(std::span<std::byte> memory, const ParameterLayout& layout, std::size_t entry,
               const at::Tensor& tensor) {
  LOCKSTEP_CHECK(!tensor.defined() || tensor.sizes() == layout.entries[entry].shape,
                 "a tensor must have its entry's shape");
  const std::span<std::byte> place = place_of(memory, layout, entry);
  if (!tensor.defined()) {
    std::fill(place.begin(), place.end(), std::byte{0});
  } else if (tensor.layout() == at::kStrided && tensor.is_contiguous() &&
             tensor.scalar_type() == scalar_type_from(layout.dtype)) {
    if (!place.empty() && tensor.const_data_ptr() != place.data())
      std::memcpy(place.data(), tensor.const_data_ptr(), place.size());
  } else {
    view_of(memory, layout, entry)
        .copy_(tensor.layout() == at::kStrided ? tensor : tensor.to_dense());
  }
  zero_padding_after(memory, layout, entry);
}

std::vector<NamedTensor> named_parameters(const torch::nn::Module& module) {
  return without_twins(module.named_parameters());
}

std::vector<NamedTensor> named_buffers(const torch::nn::Module& module) {
  return without_twins(module.named_buffers());
}

std::vector<at::Tensor> tensors_of(std::span<const NamedTensor> named) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(named.size());
  for (const NamedTensor& one : named) tensors.push_back(one.tensor);
  return tensors;
}

void ParameterLayout::add(std::string name, std::vector<std::int64_t> shape) {
  const std::size_t step = kAlignment / size_of(dtype);
  const auto count = static_cast<std::size_t>(
      std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()));
  entries.push_back({std::move(name), std::move(shape), total, count});
  total += (count + step - 1) / step * step;
}

ParameterLayout make_layout(std::span<const NamedTensor> tensors, Dtype dtype) {
  ParameterLayout layout{.dtype = dtype};
  for (const NamedTensor& one : tensors) {
    if (one.tensor.scalar_type() != scalar_type_from(dtype))
      throw ConfigError(fmt::format("'{}' is {}, not {}", one.name,
                                    c10::toString(one.tensor.scalar_type()), name_of(dtype)),
                        fmt::format("convert the module: module->to(torch::k{})",
                                    c10::toString(scalar_type_from(dtype))));
    if (one.tensor.layout() != at::kStrided || !one.tensor.device().is_cpu())
      throw ConfigError(fmt::format("'{}' is not a dense tensor on the CPU", one.name),
                        "move the module to the CPU");
    layout.add(one.name, one.tensor.sizes().vec());
  }
  return layout;
}

at::Tensor view_of(std::span<std::byte> memory, const ParameterLayout& layout, std::size_t entry,
                   std::shared_ptr<void> keep) {
  const std::span<std::byte> place = place_of(memory, layout, entry);
  const at::TensorOptions options = at::TensorOptions().dtype(scalar_type_from(layout.dtype));
  if (!keep) return at::from_blob(place.data(), layout.entries[entry].shape, options);
  return at::from_blob(
      place.data(), layout.entries[entry].shape, [keep = std::move(keep)](void*) {}, options);
}

void live_in(std::span<std::byte> memory, const ParameterLayout& layout,
             std::span<const at::Tensor> tensors, std::shared_ptr<void> keep) {
  check_memory(memory, layout, tensors.size());
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < tensors.size(); ++i)
    tensors[i].set_data(view_of(memory, layout, i, keep));
}

void copy_into(std::span<std::byte> memory, const ParameterLayout& layout,
               std::span<const at::Tensor> tensors) {
  check_memory(memory, layout, tensors.size());
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < tensors.size(); ++i) copy_into(memory, layout, i, tensors[i]);
}

void gather_gradients(std::span<const at::Tensor> parameters, const ParameterLayout& layout,
                      std::span<float> slot) {
  std::vector<at::Tensor> gradients;
  gradients.reserve(parameters.size());
  for (const at::Tensor& parameter : parameters)
    gradients.push_back(std::exchange(parameter.mutable_grad(), at::Tensor()));
  copy_into(std::as_writable_bytes(slot), layout, gradients);
}

}  // namespace lockstep
