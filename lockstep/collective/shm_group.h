// The group of ranks of one node: data moves through the segment. Private to this layer. Owned by
// its user, used by one thread at a time.
//
// A collective has two meetings at least. At the first, everybody's input is in place and its
// position known; then each rank reads what it needs and writes what it owns; after the second,
// every rank may use its result and change its input. What fits into the announcement needs the
// first alone, and so does what is copied for the others beforehand: a rank may be one operation
// ahead of its readers, so they have two places in turn. Memory outside the arenas passes through
// a staging buffer in chunks, each with meetings of its own. What an operation stages follows from
// the positions that all ranks announced, so all ranks take the same path.
//
// Files: shm_group.cc (joining, splitting), shm_reduce.cc (all_reduce, tree_all_reduce),
// shm_partial_reduce.cc (reduce, reduce_scatter), shm_staged_reduce.cc (all of them outside the
// arenas), shm_exchange.cc (what only copies), shm_point_to_point.cc (send, recv).
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/collective/endable.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/plans.h"
#include "lockstep/collective/reachable.h"
#include "lockstep/collective/reduce.h"
#include "lockstep/collective/rendezvous.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

inline constexpr std::size_t kCacheLine = 64;
inline constexpr std::size_t kStagingBytes = 4 << 20;
// all_reduce of no more bytes, over all ranks, is copied for all to read whole, which is cheaper
// than a second meeting; also of memory in the arenas; where ranks sleep at meetings.
inline constexpr std::size_t kFlatBytes = 8 << 10, kFlatArenaBytes = 2 << 10;
inline constexpr std::size_t kFlatBytesAsleep = 16 << 10;
static_assert(kFlatBytesAsleep <= kSharedInputBytes);

// What a group and its sub-groups have reserved in a rank's arena. Given back in any order: pages
// at once, the address range when everything above it is given back, too.
class ArenaRanges {
 public:
  ArenaRanges(std::shared_ptr<Segment> segment, int node_rank)
      : segment_(std::move(segment)), node_rank_(node_rank) {}
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) {
    ranges_.push_back({segment_->allocate(node_rank_, bytes, what)});
    return ranges_.back().memory;
  }
  void release(std::span<std::byte> memory) {
    for (Range& range : ranges_)
      if (range.memory.data() == memory.data() && range.memory.size() == memory.size())
        range.is_free = true;
    segment_->release(node_rank_, memory);
    for (; !ranges_.empty() && ranges_.back().is_free; ranges_.pop_back())
      segment_->release(node_rank_, ranges_.back().memory);
  }

 private:
  struct Range {
    std::span<std::byte> memory;
    bool is_free = false;
  };
  const std::shared_ptr<Segment> segment_;
  const int node_rank_;
  std::vector<Range> ranges_;
};

// Of these, one group's; given back at its end.
class ArenaMemory {
 public:
  explicit ArenaMemory(std::shared_ptr<ArenaRanges> ranges) : ranges_(std::move(ranges)) {}
  ~ArenaMemory() {
    for (auto memory = memory_.rbegin(); memory != memory_.rend(); ++memory)
      ranges_->release(*memory);
  }
  ArenaMemory(const ArenaMemory&) = delete;
  ArenaMemory& operator=(const ArenaMemory&) = delete;
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) {
    memory_.push_back(ranges_->allocate(bytes, what));
    return memory_.back();
  }
  const std::shared_ptr<ArenaRanges>& ranges() const { return ranges_; }

 private:
  const std::shared_ptr<ArenaRanges> ranges_;
  std::vector<std::span<std::byte>> memory_;
};

class ShmGroup final : public Group, public Endable, public Reachable {
 public:
  // members.blocks and members.node_ranks name the ranks; `rank` is this one's place among them.
  // `ranges`: the group's that this one is split from. `join`: of the call that waits for the
  // others.
  ShmGroup(Members members, int rank, const GroupOptions& options,
           std::shared_ptr<ArenaRanges> ranges = nullptr, const CallOptions& join = {});

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::uint64_t generation() const override { return generation_; }
  GroupStatistics statistics() const override {
    GroupStatistics statistics = meeting_.statistics();
    statistics.moved = reducer_.moved();
    return statistics;
  }
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) override {
    return memory_.allocate(bytes, what);
  }

  void end_group(const std::string& why) noexcept override { end_quietly(meeting_, why); }

  void barrier(const CallOptions& options) override;
  void broadcast(std::span<std::byte> data, Dtype dtype, int root,
                 const CallOptions& options) override;
  void all_gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options) override;
  void all_gather_uneven(std::span<const std::byte> input, std::span<std::byte> output,
                         std::span<const std::uint64_t> counts, Dtype dtype,
                         const CallOptions& options) override;
  void gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
              const CallOptions& options) override;
  void scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
               const CallOptions& options) override;
  void all_to_all(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options) override;
  void all_to_all_uneven(std::span<const std::byte> input,
                         std::span<const std::uint64_t> input_counts, std::span<std::byte> output,
                         std::span<const std::uint64_t> output_counts, Dtype dtype,
                         const CallOptions& options) override;
  void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                  const CallOptions& options) override;
  void reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction, int root,
              const CallOptions& options) override;
  void reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                      Reduction reduction, const CallOptions& options) override;
  void tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                       const TreeLayout& layout, const CallOptions& options) override;
  void send(std::span<const std::byte> data, Dtype dtype, int destination,
            const CallOptions& options) override;
  void recv(std::span<std::byte> data, Dtype dtype, int source,
            const CallOptions& options) override;
  std::unique_ptr<Group> split(int color, int key, const CallOptions& options) override;
  bool is_reachable(std::span<const std::byte> mine, Dtype dtype) const override {
    return mine.empty() || place_of(mine, size_of(dtype)) != kNowhere;
  }
  std::vector<std::span<std::byte>> reach(std::span<const std::byte> mine, Dtype dtype,
                                          const CallOptions& options) override;

 private:
  using Inputs = std::vector<const std::byte*>;  // by rank
  using Pointers = std::vector<std::byte*>;      // by rank

  // What this rank is to have of another's input.
  struct Piece {
    std::uint64_t from = 0;
    std::uint64_t bytes = 0;
    std::byte* to = nullptr;
  };
  // Every rank reads piece_of(source) from each rank's input, which is in its arena or passes
  // through its staging buffer.
  template <typename PieceOf>
  void exchange(const Call& call, std::span<const std::byte> input, const CallOptions& options,
                PieceOf&& piece_of);
  void copy_pieces(const std::vector<CallWords>& calls, std::span<const std::byte> input,
                   std::uint64_t offset, const std::vector<Piece>& pieces) const;
  // The body of a send or recv, with run()'s treatment of errors.
  template <typename Body>
  void run_message(int peer, const Call& call, const CallOptions& options, std::uint64_t bytes,
                   Body&& body);

  // One operation: announce and compare, then body(calls of all ranks). Whatever fails in between
  // ends the group.
  template <typename Body>
  void run(const Call& call, const CallOptions& options, std::uint64_t bytes, Body&& body,
           std::span<const std::byte> payload = {}) {
    const std::vector<CallWords>& calls = meeting_.begin(call, options, payload);
    try {
      body(calls);
    } catch (const CommError&) {
      throw;
    } catch (const std::exception& error) {
      meeting_.fail(error.what());
    }
    meeting_.end(bytes);
  }

  // The bytes of a rank's arena at a place that it named: checked.
  std::byte* at(int rank, std::uint64_t place, std::uint64_t bytes, std::size_t alignment) const;
  // Where memory lies in the segment if this rank's arena holds it, aligned; else kNowhere.
  std::uint64_t place_of(std::span<const std::byte> memory, std::size_t alignment) const;
  // The ranks' memory at the positions they announced, bytes_of(rank) long: checked. False if a
  // rank's is nowhere.
  template <typename BytesOf, typename Pointer>
  bool locate(const std::vector<CallWords>& calls, std::size_t word, std::size_t alignment,
              BytesOf&& bytes_of, std::vector<Pointer>& pointers) const {
    pointers.assign(size_, nullptr);
    for (int rank = 0; rank < size_; ++rank) {
      const std::uint64_t place = calls[rank][word];
      const std::size_t bytes = bytes_of(rank);
      if (bytes == 0) continue;
      if (place == kNowhere) return false;
      pointers[rank] = at(rank, place, bytes, alignment);
    }
    return true;
  }
  // Copies the beginning of `input` to this rank's staging buffer.
  void stage(std::span<const std::byte> input) {
    if (input.empty()) return;
    std::memcpy(staging_.data(), input.data(), std::min(input.size(), kStagingBytes));
  }
  // A reduction of memory outside the arenas, seen from this rank.
  struct StagedSlices {
    std::vector<std::span<const std::byte>> inputs =
        {};                               // this rank's values of each owner's slice
    std::byte* result = nullptr;          // where this rank's own slice goes; nullptr: nowhere
    std::vector<std::byte*> copies = {};  // where each other owner's slice goes; empty: nowhere
    bool anybody_copies = true;           // whether any rank has `copies`
  };
  void reduce_staged(const ReduceJob& job, const StagedSlices& slices);
  // all_reduce of what every rank has copied into its control block.
  void reduce_copies(const ReduceJob& job, std::span<std::byte> data, std::uint64_t sequence,
                     bool is_flat);
  Slice own_slice(std::size_t count, Dtype dtype) const {
    return slice_of({rank_, rank_ + 1}, size_, count, dtype);
  }
  // The ranks' slices of `data`, in bytes.
  std::vector<std::span<std::byte>> slices_of(std::span<std::byte> data, Dtype dtype) const;
  // Of the ranks' data, one virtual rank a rank.
  ReduceJob job_of(Dtype dtype, Reduction reduction) const {
    return {.plan = own_tree_.plan,
            .dtype = dtype,
            .reduction = reduction,
            .round_once = true,
            .slot_bytes = 0};
  }
  // The plan's steps after the first meeting, which the announcement was. `results`: where what
  // this rank combines goes.
  void execute(const Plan& plan, const ReduceJob& job, const Inputs& slots, const Pointers& results,
               std::size_t count);

  const std::shared_ptr<Segment> segment_;
  const std::vector<int> node_ranks_;  // whose arena is whose: by rank
  const int rank_;
  const int size_;
  const std::uint64_t generation_;
  const Clock::duration timeout_;
  const std::function<void()> on_records_;
  ArenaMemory memory_;
  Rendezvous meeting_;
  const Plan owner_writes_all_;
  const Plan flat_;
  const Tree own_tree_;         // all_reduce: one virtual rank a rank
  std::unique_ptr<Tree> tree_;  // tree_all_reduce: the last layout's
  std::uint64_t* counts(int rank) const {
    return reinterpret_cast<std::uint64_t*>(stagings_[rank] + kStagingBytes);
  }
  // kStagingBytes, followed by this rank's counts of all_to_all_uneven.
  std::span<std::byte> staging_;
  Pointers stagings_;
  Inputs slots_;      // scratch of one operation, of the group's size
  Pointers results_;  // scratch of one operation
  Reducer reducer_;
};

}  // namespace lockstep
