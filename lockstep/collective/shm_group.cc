#include "lockstep/collective/shm_group.h"

#include <fmt/format.h>

namespace lockstep {
namespace {

TreeLayout one_each(int size) {
  TreeLayout layout{.runs = {}, .virtual_ranks = size};
  for (int rank = 0; rank < size; ++rank) layout.runs.push_back({rank, rank + 1});
  return layout;
}

}  // namespace

ShmGroup::ShmGroup(Members members, int rank, const GroupOptions& options)
    : segment_(members.segment),
      node_ranks_(members.node_ranks),
      rank_(rank),
      size_(static_cast<int>(node_ranks_.size())),
      generation_(options.generation),
      memory_(segment_, node_ranks_.at(rank)),
      meeting_(std::move(members), rank, options),
      own_tree_(one_each(size_)),
      staging_(memory_.allocate(kStagingBytes, "the staging buffer of a rank")) {
  run({.operation = Operation::join, .place = place_of(staging_, kCacheLine)}, {}, 0,
      [&](const auto& calls) {
        if (!locate(
                calls, kPlaceWord, kCacheLine, [](int) { return kStagingBytes; }, stagings_))
          throw Error("a rank announced no staging buffer");
      });
}

void ShmGroup::barrier(const CallOptions& options) {
  run({.operation = Operation::barrier}, options, 0, [](const auto&) {});
}

std::byte* ShmGroup::at(int rank, std::uint64_t place, std::uint64_t bytes,
                        std::size_t alignment) const {
  if (place % alignment != 0)
    throw Error(fmt::format("rank {} named the misaligned offset {}", rank, place));
  return segment_->at(node_ranks_[rank], place, bytes).data();
}

std::uint64_t ShmGroup::place_of(std::span<const std::byte> memory, std::size_t alignment) const {
  const int own = node_ranks_[rank_];
  if (memory.empty() || segment_->arena_owner(memory.data()) != own ||
      segment_->arena_owner(&memory.back()) != own)
    return kNowhere;
  const auto offset = static_cast<std::uint64_t>(segment_->offset_of(memory.data()));
  return offset % alignment == 0 ? offset : kNowhere;
}

std::unique_ptr<Group> make_shm_group(std::shared_ptr<Segment> segment, int rank,
                                      const GroupOptions& options) {
  const int ranks = segment->ranks();
  if (rank < 0 || rank >= ranks)
    throw ConfigError(fmt::format("rank {} in a segment for {} ranks", rank, ranks));
  return std::make_unique<ShmGroup>(all_members(std::move(segment)), rank, options);
}

}  // namespace lockstep
