#include "lockstep/recipes/text.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/softmax.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {

std::vector<std::filesystem::path> libtorch_headers() {
  Dl_info library{};
  std::error_code error;
  std::filesystem::path include;
  if (::dladdr(reinterpret_cast<const void*>(&at::globalContext), &library) != 0)
    include = std::filesystem::canonical(library.dli_fname, error).parent_path().parent_path() /
              "include";
  std::vector<std::filesystem::path> folders = {include / "c10",
                                                include / "torch/csrc/api/include"};
  for (const auto& folder : folders)
    if (!std::filesystem::is_directory(folder, error))
      throw ConfigError(
          fmt::format("libtorch's headers, the default text, are not in {}", folder.string()),
          "--data with a file or folder of text");
  return folders;
}

Batch TextBatches::batch(std::span<const std::uint64_t> indices) const {
  const std::int64_t block = data_.sample_size(), length = block - 1;
  const auto rows = static_cast<std::int64_t>(indices.size());
  Batch batch{at::empty({rows, length}, at::kLong), at::empty({rows, length}, at::kLong)};
  auto* input = batch.input.mutable_data_ptr<std::int64_t>();
  auto* target = batch.target.mutable_data_ptr<std::int64_t>();
  for (const std::uint64_t index : indices) {
    LOCKSTEP_CHECK(index < data_.rows);
    const std::uint8_t* bytes = data_.bytes.data() + index * static_cast<std::uint64_t>(block);
    input = std::copy(bytes, bytes + length, input);
    target = std::copy(bytes + 1, bytes + block, target);
  }
  return batch;
}

LossValue text_loss(const at::Tensor& output, const at::Tensor& target) {
  return {at::cross_entropy_loss(output.flatten(0, 1), target.flatten(), {}, at::Reduction::Sum),
          static_cast<double>(target.numel())};
}

std::string generate(const Model& model, std::int64_t context, std::string_view prompt,
                     std::int64_t length, std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  std::string text = prompt.empty() ? "\n" : std::string(prompt);
  for (std::int64_t i = 0; i < length; ++i) {
    const std::int64_t seen = std::min(context, static_cast<std::int64_t>(text.size()));
    at::Tensor tokens = at::empty({1, seen}, at::kLong);
    std::transform(text.end() - seen, text.end(), tokens.mutable_data_ptr<std::int64_t>(),
                   [](char c) { return static_cast<std::uint8_t>(c); });
    const at::Tensor chances =
        at::softmax(model.forward(tokens).select(1, seen - 1).select(0, 0), 0).contiguous();
    double rest =
        std::ldexp(static_cast<double>(mix({seed, static_cast<std::uint64_t>(i)}) >> 11), -53);
    const float* chance = chances.const_data_ptr<float>();
    std::int64_t byte = 0;
    while (byte + 1 < chances.numel() && (rest -= double{chance[byte]}) >= 0) ++byte;
    text += static_cast<char>(byte);
  }
  return text;
}

}  // namespace lockstep
