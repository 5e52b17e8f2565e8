// A module's tensors as one flat memory: where each lies, moving them there, and gathering their
// gradients into memory of the same layout.
//
// The caller owns every memory named here and keeps it alive as long as tensors point into it.
// Threads: as for the tensors themselves, one at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lockstep/base/dtype.h"

namespace torch::nn {
class Module;
}

namespace lockstep {

struct NamedTensor {
  std::string name;  // "layers.0.weight", as in libtorch
  at::Tensor tensor;
};

// In the order of registration, a tied tensor once, under its first name.
std::vector<NamedTensor> named_parameters(const torch::nn::Module& module);
std::vector<NamedTensor> named_buffers(const torch::nn::Module& module);
std::vector<at::Tensor> tensors_of(std::span<const NamedTensor> named);

// Where tensors of one dtype lie in one flat memory: dense, in order, each starting at a multiple
// of 64 bytes. Counts and offsets in elements. Pure data.
struct ParameterLayout {
  struct Entry {
    std::string name;
    std::vector<std::int64_t> shape;
    std::size_t offset = 0;
    std::size_t count = 0;
    bool operator==(const Entry&) const = default;
  };
  Dtype dtype = Dtype::float32;
  std::vector<Entry> entries = {};
  std::size_t total = 0;  // with the padding after the last tensor

  std::size_t bytes() const { return total * size_of(dtype); }
  void add(std::string name, std::vector<std::int64_t> shape);
  bool operator==(const ParameterLayout&) const = default;
};
// Throws ConfigError naming a tensor that is not of this dtype, not dense or not on the CPU.
ParameterLayout make_layout(std::span<const NamedTensor> tensors, Dtype dtype = Dtype::float32);

// A tensor over the place of an entry in `memory` (64-byte aligned, layout.bytes() long). `keep`,
// where given, lives as long as the tensor's storage.
at::Tensor view_of(std::span<std::byte> memory, const ParameterLayout& layout, std::size_t entry,
                   std::shared_ptr<void> keep = nullptr);

// Every tensor lives in its place from now on, with the values there: the same tensor, other
// storage, so that optimizers, hooks and tied uses keep working. The memory may be mapped
// read-only.
void live_in(std::span<std::byte> memory, const ParameterLayout& layout,
             std::span<const at::Tensor> tensors, std::shared_ptr<void> keep = nullptr);

// Copies tensors into their places, an undefined one as zeros; padding becomes zero. A tensor that
// lives in its place already costs nothing. Sparse tensors arrive dense.
void copy_into(std::span<std::byte> memory, const ParameterLayout& layout,
               std::span<const at::Tensor> tensors);
// The same for the tensor of one entry, under a NoGradGuard.
void copy_into(std::span<std::byte> memory, const ParameterLayout& layout, std::size_t entry,
               const at::Tensor& tensor);

// copy_into() for each parameter's .grad. Leaves every .grad undefined, so that the next backward
// hands over its own buffer again.
void gather_gradients(std::span<const at::Tensor> parameters, const ParameterLayout& layout,
                      std::span<float> slot);

}  // namespace lockstep
