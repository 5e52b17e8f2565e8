#include "lockstep/parallel/same_module.h"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/bridge/dtypes.h"

namespace lockstep {
namespace {

std::string describe(std::string_view kind, const NamedTensor& one) {
  const at::Tensor& t = one.tensor;
  return fmt::format("{} '{}' {} [{}] on {}{}", kind, one.name, c10::toString(t.scalar_type()),
                     fmt::join(t.sizes(), ", "), t.device().str(),
                     t.requires_grad() ? " with gradient" : "");
}

using Digest = std::array<char, 64>;
Digest digest_of(std::string_view text) {
  Digest digest;
  const std::string hex = sha256_hex(std::as_bytes(std::span(text)));
  std::copy_n(hex.begin(), digest.size(), digest.begin());
  return digest;
}

// Every rank's `mine`, in order of rank.
template <typename T>
std::vector<T> gather(Group& group, std::span<const T> mine, std::string_view tag) {
  std::vector<T> all(mine.size() * static_cast<std::size_t>(group.size()));
  group.all_gather(std::as_bytes(mine), std::as_writable_bytes(std::span(all)), Dtype::uint8,
                   {.tag = tag});
  return all;
}

// The digests of all descriptions, and how many there are.
struct Fingerprint {
  std::uint64_t count = 0;
  Digest digest{};
  bool operator==(const Fingerprint&) const = default;
};

// Finds the first description that differs between ranks and throws ConfigError with both. All
// ranks end up here together, and throw the same.
[[noreturn]] void throw_difference(Group& group, const std::vector<std::string>& descriptions,
                                   std::span<const Fingerprint> fingerprints) {
  std::uint64_t common = descriptions.size();
  for (const Fingerprint& one : fingerprints) common = std::min(common, one.count);
  std::vector<Digest> digests;
  for (std::size_t i = 0; i < common; ++i) digests.push_back(digest_of(descriptions[i]));
  std::size_t first = common;
  if (common > 0) {
    const std::vector<Digest> all = gather<Digest>(group, digests, "module description");
    for (std::size_t i = 0; i < all.size(); ++i)
      if (all[i] != all[i % common]) first = std::min<std::size_t>(first, i % common);
  }
  using Text = std::array<char, 256>;
  Text mine{};
  const std::string text = first < descriptions.size() ? descriptions[first] : "nothing there";
  std::copy_n(text.begin(), std::min(text.size(), mine.size() - 1), mine.begin());
  const std::vector<Text> texts = gather<Text>(group, {&mine, 1}, "module description");
  const auto other = std::find_if(texts.begin(), texts.end(),
                                  [&](const Text& one) { return one != texts.front(); });
  throw ConfigError(
      fmt::format("data_parallel: the module differs between ranks: rank 0 has {}, rank {} has {}",
                  texts.front().data(), other - texts.begin(),
                  other == texts.end() ? "the same" : other->data()),
      "build the same module, in the same order, on every rank");
}

}  // namespace

void check_same_module(Group& group, std::span<const NamedTensor> parameters,
                       std::span<const NamedTensor> buffers) {
  std::vector<std::string> descriptions;
  for (const NamedTensor& one : parameters) descriptions.push_back(describe("parameter", one));
  for (const NamedTensor& one : buffers) descriptions.push_back(describe("buffer", one));
  const Fingerprint mine{descriptions.size(),
                         digest_of(fmt::format("{}", fmt::join(descriptions, "\n")))};
  const auto all = gather<Fingerprint>(group, {&mine, 1}, "module description");
  if (std::any_of(all.begin(), all.end(), [&](const auto& one) { return one != all.front(); }))
    throw_difference(group, descriptions, all);
}

void broadcast_values(Group& group, std::span<const NamedTensor> tensors, int root) {
  const at::NoGradGuard no_grad;
  for (const NamedTensor& one : tensors) {
    if (one.tensor.layout() != at::kStrided || !one.tensor.device().is_cpu())
      throw ConfigError(
          fmt::format("data_parallel: '{}' is not a dense tensor on the CPU", one.name),
          "move the module to the CPU");
    const at::Tensor dense = one.tensor.data().contiguous();
    if (dense.nbytes() == 0) continue;
    group.broadcast(bytes_of(dense), Dtype::uint8, root, {.tag = one.name});
    if (!one.tensor.is_contiguous()) one.tensor.data().copy_(dense);
  }
}

}  // namespace lockstep
