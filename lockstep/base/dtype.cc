#include "lockstep/base/dtype.h"

#include <algorithm>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

struct Row {
  std::size_t size;
  std::string_view name;
  std::string_view safetensors_name;
  bool floating_point;
};

// Indexed by the enumerator's value.
constexpr Row kRows[kDtypeCount] = {
    {8, "float64", "F64", true},   {4, "float32", "F32", true}, {2, "float16", "F16", true},
    {2, "bfloat16", "BF16", true}, {1, "int8", "I8", false},    {4, "int32", "I32", false},
    {8, "int64", "I64", false},    {1, "uint8", "U8", false},
};

const Row& row_of(Dtype dtype) {
  const auto index = static_cast<std::size_t>(dtype);
  LOCKSTEP_CHECK(index < kDtypeCount, "not a dtype");
  return kRows[index];
}

std::optional<Dtype> find(std::string_view wanted, std::string_view Row::*name) {
  const auto found = std::ranges::find(kRows, wanted, name);
  if (found == std::end(kRows)) return std::nullopt;
  return static_cast<Dtype>(found - kRows);
}

}  // namespace

std::size_t size_of(Dtype dtype) { return row_of(dtype).size; }
std::string_view name_of(Dtype dtype) { return row_of(dtype).name; }
std::string_view safetensors_name_of(Dtype dtype) { return row_of(dtype).safetensors_name; }
bool is_floating_point(Dtype dtype) { return row_of(dtype).floating_point; }

std::optional<Dtype> dtype_from_name(std::string_view name) { return find(name, &Row::name); }
std::optional<Dtype> dtype_from_safetensors_name(std::string_view name) {
  return find(name, &Row::safetensors_name);
}

}  // namespace lockstep
