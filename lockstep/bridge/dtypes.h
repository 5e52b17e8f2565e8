// libtorch's element types as lockstep's, and the bytes of a tensor. Pure; any thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <optional>
#include <span>

#include "lockstep/base/dtype.h"

namespace lockstep {

// Nothing for types that no collective reduces (bool, complex, quantized).
std::optional<Dtype> dtype_from(at::ScalarType type);
at::ScalarType scalar_type_from(Dtype dtype);

// The memory of a contiguous CPU tensor, valid while its storage lives.
std::span<std::byte> bytes_of(const at::Tensor& tensor);

}  // namespace lockstep
