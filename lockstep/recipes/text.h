// Text for gpt: its bytes as batches, its loss, the text that there is wherever libtorch is, and
// writing more of it. One thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/data/dataset.h"
#include "lockstep/recipes/model.h"
#include "lockstep/train/task.h"

namespace lockstep {

inline constexpr std::int64_t kByteValues = 256;

// Folders with a few MB of headers beside the libtorch that this program runs with. Throws
// ConfigError.
std::vector<std::filesystem::path> libtorch_headers();

// Blocks of text (data/dataset.h, load_text): input [n, block - 1] int64, target the same, one byte
// on. `data` must outlive this.
class TextBatches : public BatchSource {
 public:
  explicit TextBatches(const Dataset& data) : data_(data) {}
  std::uint64_t size() const override { return data_.rows; }
  Batch batch(std::span<const std::uint64_t> indices) const override;

 private:
  const Dataset& data_;
};

// Cross-entropy over all bytes of a batch: nats, and how many bytes.
LossValue text_loss(const at::Tensor& output, const at::Tensor& target);

// `prompt` and `length` bytes after it, drawn from the model's distribution by `seed`.
std::string generate(const Model& model, std::int64_t context, std::string_view prompt,
                     std::int64_t length, std::uint64_t seed);

}  // namespace lockstep
