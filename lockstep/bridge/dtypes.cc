#include "lockstep/bridge/dtypes.h"

#include "lockstep/base/error.h"

namespace lockstep {

std::optional<Dtype> dtype_from(at::ScalarType type) {
  for (int i = 0; i < kDtypeCount; ++i)
    if (scalar_type_from(static_cast<Dtype>(i)) == type) return static_cast<Dtype>(i);
  return std::nullopt;
}

at::ScalarType scalar_type_from(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return at::kDouble;
    case Dtype::float32:
      return at::kFloat;
    case Dtype::float16:
      return at::kHalf;
    case Dtype::bfloat16:
      return at::kBFloat16;
    case Dtype::int8:
      return at::kChar;
    case Dtype::int32:
      return at::kInt;
    case Dtype::int64:
      return at::kLong;
    case Dtype::uint8:
      return at::kByte;
  }
  LOCKSTEP_CHECK(false, "unknown dtype");
}

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  LOCKSTEP_CHECK(tensor.is_contiguous() && tensor.device().is_cpu(),
                 "bytes_of() takes contiguous CPU tensors");
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

}  // namespace lockstep
