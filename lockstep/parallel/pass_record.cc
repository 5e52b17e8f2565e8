#include "lockstep/parallel/pass_record.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

struct Header {
  double weight;
  std::uint32_t parameter;
  std::uint8_t problem;
  std::uint8_t active;
  std::uint16_t unused = 0;
};
static_assert(sizeof(Header) == 16);

}  // namespace

std::vector<PassRecord> exchange(Group& group, const PassRecord& mine) {
  const std::size_t parameters = mine.used.size();
  const std::size_t size = sizeof(Header) + (parameters + 7) / 8;
  std::vector<std::byte> bytes(size), all(size * static_cast<std::size_t>(group.size()));
  const Header header{mine.weight, mine.parameter, static_cast<std::uint8_t>(mine.problem),
                      mine.active};
  std::memcpy(bytes.data(), &header, sizeof header);
  for (std::size_t i = 0; i < parameters; ++i)
    if (mine.used[i]) bytes[sizeof(Header) + i / 8] |= std::byte{1} << (i % 8);
  group.all_gather(bytes, all, Dtype::uint8, {.tag = "record of the backward pass"});

  std::vector<PassRecord> records;
  for (std::size_t offset = 0; offset < all.size(); offset += size) {
    Header theirs;
    std::memcpy(&theirs, all.data() + offset, sizeof theirs);
    if (theirs.problem > static_cast<std::uint8_t>(GradientProblem::left_over) ||
        (theirs.problem != 0 && theirs.parameter >= parameters))
      throw CommError(
          fmt::format("rank {} sent a broken record of its backward pass", records.size()));
    PassRecord& record = records.emplace_back(
        PassRecord{theirs.weight, theirs.active != 0, static_cast<GradientProblem>(theirs.problem),
                   theirs.parameter});
    for (std::size_t i = 0; i < parameters; ++i)
      record.used.push_back((all[offset + sizeof(Header) + i / 8] >> (i % 8) & std::byte{1}) !=
                            std::byte{0});
  }
  return records;
}

void check_problems(std::span<const PassRecord> records, std::span<const NamedTensor> parameters) {
  const auto bad = std::find_if(records.begin(), records.end(), [](const PassRecord& one) {
    return one.problem != GradientProblem::none;
  });
  if (bad == records.end()) return;
  const std::string& name = parameters[bad->parameter].name;
  const auto rank = bad - records.begin();
  switch (bad->problem) {
    case GradientProblem::frozen:
      throw ConfigError(
          fmt::format("data_parallel: parameter '{}' has a gradient on rank {}, but required none "
                      "when the module was wrapped: it would not be averaged",
                      name, rank),
          "call data_parallel after requires_grad is set");
    case GradientProblem::has_graph:
      throw ConfigError(
          fmt::format("data_parallel: the gradient of parameter '{}' on rank {} has a graph of its "
                      "own (create_graph), which averaging would cut",
                      name, rank),
          "take derivatives of gradients with torch::autograd::grad");
    case GradientProblem::left_over:
      throw ConfigError(
          fmt::format("data_parallel: rank {} ran out of batches with a gradient of parameter '{}' "
                      "that was accumulated under no_sync() and never averaged",
                      rank, name),
          "run a rank's last backward() without no_sync(), or zero_grad() what is not to count");
    case GradientProblem::none:
      break;
  }
}

void check_all_used(std::span<const PassRecord> records, std::span<const NamedTensor> parameters,
                    const std::vector<bool>& trained) {
  constexpr std::size_t kNamed = 8;
  std::vector<std::string> unused;
  std::size_t count = 0;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (!trained[i]) continue;
    std::vector<std::size_t> ranks;
    for (std::size_t rank = 0; rank < records.size(); ++rank)
      if (records[rank].active && !records[rank].used[i]) ranks.push_back(rank);
    if (ranks.empty() || ++count > kNamed) continue;
    unused.push_back(
        ranks.size() == records.size()
            ? fmt::format("'{}' on every rank", parameters[i].name)
            : fmt::format("'{}' on rank {}", parameters[i].name, fmt::join(ranks, ", ")));
  }
  if (count == 0) return;
  throw ConfigError(
      fmt::format("data_parallel: the loss did not use parameter {}{}", fmt::join(unused, "; "),
                  count > kNamed ? fmt::format("; and {} more", count - kNamed) : ""),
      "use or freeze them, or set .find_unused_parameters = true");
}

}  // namespace lockstep
