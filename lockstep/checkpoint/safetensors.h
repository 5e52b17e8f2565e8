// Reading and writing safetensors files (https://github.com/huggingface/safetensors, "Format"): 8
// bytes of little-endian header length, a JSON header, the tensors' bytes. Names, shapes and bytes
// only; knows no modules. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/dtype.h"

namespace lockstep {

struct TensorView {
  std::string name;
  Dtype dtype = Dtype::float32;
  std::vector<std::int64_t> shape;   // empty: a scalar
  std::span<const std::byte> bytes;  // row-major
};

// Bytes of a tensor of non-negative extents, or nothing where that doesn't fit 64 bits.
std::optional<std::uint64_t> byte_count(const std::vector<std::int64_t>& shape, Dtype dtype);
// For messages: a name from a file, in quotes, on one line and not too long.
std::string shown_name(std::string_view name);

// Tensors sorted by name, header without metadata and padded with spaces so that data begins
// 64-byte aligned: the same tensors give the same bytes. Whole or not at all. Throws Error. Returns
// the file's SHA-256: what `sha256sum` prints for it.
std::string write_safetensors(const std::filesystem::path& path, std::vector<TensorView> tensors);

// A whole file in memory; views stay valid as long as it lives. Throws ConfigError naming the file
// and what is wrong: truncated, header too long, not JSON, unknown dtype, shape and offsets that
// disagree, overlapping or out of bounds.
class SafetensorsFile {
 public:
  static SafetensorsFile read(const std::filesystem::path& path);
  static SafetensorsFile parse(std::vector<std::byte> bytes, std::string name_for_errors);
  const std::vector<TensorView>& tensors() const { return tensors_; }  // sorted by name
  const TensorView* find(std::string_view name) const;                 // nullptr: there is none

  SafetensorsFile(SafetensorsFile&&) = default;  // a copy's views would point into the original
  SafetensorsFile& operator=(SafetensorsFile&&) = default;

 private:
  SafetensorsFile() = default;
  std::vector<std::byte> bytes_;
  std::vector<TensorView> tensors_;
};

}  // namespace lockstep
