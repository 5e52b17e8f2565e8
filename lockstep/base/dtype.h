// Element types of tensors, spans and files. Values are part of the segment's and the wire's
// format: never renumber.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace lockstep {

enum class Dtype : std::uint8_t {
  float64 = 0,
  float32 = 1,
  float16 = 2,
  bfloat16 = 3,
  int8 = 4,
  int32 = 5,
  int64 = 6,
  uint8 = 7,
};
inline constexpr int kDtypeCount = 8;

std::size_t size_of(Dtype dtype);                             // bytes of one element
std::string_view name_of(Dtype dtype);                        // "float32", as in PyTorch
std::string_view safetensors_name_of(Dtype dtype);            // "F32"
std::optional<Dtype> dtype_from_name(std::string_view name);
std::optional<Dtype> dtype_from_safetensors_name(std::string_view name);
bool is_floating_point(Dtype dtype);

}  // namespace lockstep
