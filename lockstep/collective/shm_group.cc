#include "lockstep/collective/shm_group.h"

#include <fmt/format.h>

#include "lockstep/memory/control_block.h"

namespace lockstep {
namespace {

// What a rank shows the other members of a sub-group.
struct SubGroupBlock {
  ControlBlock block;
  std::atomic<std::uint64_t> failed;  // the sub-group's, if this is its first rank
};

struct Member {
  int color, key, rank;
};

}  // namespace

ShmGroup::ShmGroup(Members members, int rank, const GroupOptions& options,
                   std::shared_ptr<ArenaRanges> ranges, const CallOptions& join)
    : segment_(members.segment),
      node_ranks_(members.node_ranks),
      rank_(rank),
      size_(static_cast<int>(node_ranks_.size())),
      generation_(options.generation),
      timeout_(options.timeout),
      on_records_(options.on_records),
      memory_(ranges ? std::move(ranges)
                     : std::make_shared<ArenaRanges>(segment_, node_ranks_.at(rank))),
      meeting_(std::move(members), rank, options),
      owner_writes_all_(plan_owner_writes_all(rank, size_)),
      flat_(plan_flat(rank, size_)),
      own_tree_(one_each(size_)),
      staging_(memory_.allocate(kStagingBytes + size_ * sizeof(std::uint64_t),
                                "the staging buffer of a rank")),
      slots_(size_) {
  run({.operation = Operation::join, .place = place_of(staging_, kCacheLine)}, join, 0,
      [&](const auto& calls) {
        if (!locate(
                calls, kPlaceWord, kCacheLine, [&](int) { return staging_.size(); }, stagings_))
          throw Error("a rank announced no staging buffer");
        meeting_.agree_on_waiting();
      });
}

void ShmGroup::barrier(const CallOptions& options) {
  run({.operation = Operation::barrier}, options, 0, [](const auto&) {});
}

std::vector<std::span<std::byte>> ShmGroup::reach(std::span<const std::byte> mine, Dtype dtype,
                                                  const CallOptions& options) {
  std::vector<std::span<std::byte>> all;
  const Call call{
      .operation = Operation::barrier, .place = place_of(mine, size_of(dtype)), .own = mine.size()};
  run(call, options, 0, [&](const auto& calls) {
    const auto bytes_of = [&](int rank) { return calls[rank][kOwnWord]; };
    if (!locate(calls, kPlaceWord, size_of(dtype), bytes_of, results_))
      throw Error("a rank announced memory outside its arena");
    for (int rank = 0; rank < size_; ++rank) all.emplace_back(results_[rank], bytes_of(rank));
  });
  return all;
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

std::unique_ptr<Group> ShmGroup::split(int color, int key, const CallOptions& options) {
  const Clock::time_point started = Clock::now();
  const Clock::duration timeout = options.timeout.value_or(timeout_);
  // Never given back: others may look at it when this rank's group is gone.
  const auto own = segment_->allocate_lasting(node_ranks_[rank_], sizeof(SubGroupBlock),
                                              "a sub-group's control block");
  const Call call{.operation = Operation::split,
                  .place = place_of(own, kCacheLine),
                  .own = static_cast<std::uint64_t>(static_cast<std::uint32_t>(color)) << 32 |
                         static_cast<std::uint32_t>(key)};
  std::vector<Member> chosen;
  Members members{.segment = segment_,
                  .node_ranks = {},
                  .crowd = meeting_.crowd(),
                  .blocks = {},
                  .failed = {},
                  .name = {}};
  run(call, options, 0, [&](const auto& calls) {
    for (int rank = 0; rank < size_; ++rank) {
      const std::uint64_t own_word = calls[rank][kOwnWord];
      const Member member{static_cast<std::int32_t>(own_word >> 32),
                          static_cast<std::int32_t>(own_word), rank};
      if (member.color == color) chosen.push_back(member);
    }
    std::ranges::stable_sort(chosen, {}, &Member::key);
    for (const Member& member : chosen) {
      auto* theirs = reinterpret_cast<SubGroupBlock*>(
          at(member.rank, calls[member.rank][kPlaceWord], sizeof(SubGroupBlock), kCacheLine));
      members.node_ranks.push_back(node_ranks_[member.rank]);
      members.blocks.push_back(&theirs->block);
      if (members.failed == nullptr) members.failed = &theirs->failed;
    }
  });
  if (color < 0) return nullptr;
  members.name = fmt::format("ranks {}", fmt::join(members.node_ranks, ","));
  const auto self = std::ranges::find(chosen, rank_, &Member::rank);
  const Clock::duration left = std::max(timeout - (Clock::now() - started), Clock::duration(1));
  return std::make_unique<ShmGroup>(
      std::move(members), static_cast<int>(self - chosen.begin()),
      GroupOptions{.generation = generation_, .timeout = timeout_, .on_records = on_records_},
      memory_.ranges(), CallOptions{.tag = options.tag, .timeout = left});
}

std::unique_ptr<Group> make_shm_group(std::shared_ptr<Segment> segment, int rank,
                                      const GroupOptions& options) {
  Members members = all_members(std::move(segment), options.seats);
  const std::size_t ranks = members.blocks.size();
  if (rank < 0 || rank >= static_cast<int>(ranks))
    throw ConfigError(fmt::format("rank {} in a group of {} ranks", rank, ranks));
  return std::make_unique<ShmGroup>(std::move(members), rank, options);
}

}  // namespace lockstep
