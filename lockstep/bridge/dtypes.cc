#include "lockstep/bridge/dtypes.h"

#include <algorithm>

#include "lockstep/base/error.h"

namespace lockstep {

// Indexed by the enumerator's value.
constexpr at::ScalarType kTypes[kDtypeCount] = {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16,
                                                at::kChar,   at::kInt,   at::kLong, at::kByte};

std::optional<Dtype> dtype_from(at::ScalarType type) {
  const auto found = std::ranges::find(kTypes, type);
  if (found == std::end(kTypes)) return std::nullopt;
  return static_cast<Dtype>(found - kTypes);
}

at::ScalarType scalar_type_from(Dtype dtype) {
  LOCKSTEP_CHECK(static_cast<int>(dtype) < kDtypeCount, "unknown dtype");
  return kTypes[static_cast<std::size_t>(dtype)];
}

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  LOCKSTEP_CHECK(tensor.is_contiguous() && tensor.device().is_cpu(),
                 "bytes_of() takes contiguous CPU tensors");
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

}  // namespace lockstep
