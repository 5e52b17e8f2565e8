// The group of one node's ranks: data moves through the segment, each rank working on a slice.
//
// A collective has two meetings at least. At the first, everybody's input is in place and its
// position known; then each rank reads what it needs and writes what it owns; after the second,
// every rank may use its result and change its input. Memory outside the arenas passes through a
// staging buffer in chunks, each with meetings of its own. Whether an operation stages follows from
// the positions that all ranks announced, so all ranks take the same path.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/reduce.h"
#include "lockstep/collective/rendezvous.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

constexpr std::size_t kStagingBytes = 4 << 20;
constexpr std::size_t kCacheLine = 64;

// What a rank reserved in its arena; given back at the end, last first.
class ArenaMemory {
 public:
  ArenaMemory(std::shared_ptr<Segment> segment, int rank)
      : segment_(std::move(segment)), rank_(rank) {}
  ~ArenaMemory() {
    for (auto memory = memory_.rbegin(); memory != memory_.rend(); ++memory)
      segment_->release(rank_, *memory);
  }
  ArenaMemory(const ArenaMemory&) = delete;
  ArenaMemory& operator=(const ArenaMemory&) = delete;
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) {
    memory_.push_back(segment_->allocate(rank_, bytes, what));
    return memory_.back();
  }

 private:
  std::shared_ptr<Segment> segment_;
  const int rank_;
  std::vector<std::span<std::byte>> memory_;
};

// What follows from a TreeLayout; built once and kept while the layout stays the same.
struct Tree {
  TreeLayout layout;
  std::uint64_t digest = 0;
  std::vector<std::size_t> contributions;  // by rank
  CombinePlan plan;

  explicit Tree(TreeLayout of) : layout(std::move(of)) {
    for (const VirtualRange run : layout.runs) {
      digest =
          mix({digest, static_cast<std::uint64_t>(run.lo), static_cast<std::uint64_t>(run.hi)});
      contributions.push_back(maximal_subtrees(run, layout.virtual_ranks).size());
    }
    plan = plan_combination(layout.runs, layout.virtual_ranks);
  }
};

TreeLayout one_each(int size) {
  TreeLayout layout{.runs = {}, .virtual_ranks = size};
  for (int rank = 0; rank < size; ++rank) layout.runs.push_back({rank, rank + 1});
  return layout;
}

class ShmGroup final : public Group {
 public:
  ShmGroup(std::shared_ptr<Segment> segment, int rank, const GroupOptions& options)
      : segment_(std::move(segment)),
        rank_(rank),
        size_(segment_->ranks()),
        generation_(options.generation),
        memory_(segment_, rank),
        meeting_(segment_, rank, options),
        own_tree_(one_each(size_)),
        staging_(memory_.allocate(kStagingBytes, "the staging buffer of a rank")) {
    run({.operation = Operation::join, .place = place_of(staging_, kCacheLine)}, {}, 0,
        [&](const auto& calls) {
          if (!locate(
                  calls, kPlaceWord, kCacheLine, [](int) { return kStagingBytes; }, stagings_))
            throw Error("a rank announced no staging buffer");
        });
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::uint64_t generation() const override { return generation_; }
  GroupStatistics statistics() const override { return meeting_.statistics(); }
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) override {
    return memory_.allocate(bytes, what);
  }

  void barrier(const CallOptions& options) override {
    run({.operation = Operation::barrier}, options, 0, [](const auto&) {});
  }
  void broadcast(std::span<std::byte> data, Dtype dtype, int root,
                 const CallOptions& options) override;
  void all_gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options) override;
  void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                  const CallOptions& options) override;
  void tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                       const TreeLayout& layout, const CallOptions& options) override;

 private:
  using Pointers = std::vector<std::byte*>;  // by rank

  // One operation: announce and compare, then body(calls of all ranks). Whatever fails in between
  // ends the group.
  template <typename Body>
  void run(Call call, const CallOptions& options, std::uint64_t bytes, Body&& body) {
    const std::vector<CallWords>& calls = meeting_.begin(std::move(call), options);
    try {
      body(calls);
    } catch (const CommError&) {
      throw;
    } catch (const std::exception& error) {
      meeting_.fail(error.what());
    }
    meeting_.end(bytes);
  }

  // Where memory lies in the segment if this rank's arena holds it, aligned; else kNowhere.
  std::uint64_t place_of(std::span<const std::byte> memory, std::size_t alignment) const;
  // The ranks' memory at the positions they announced, bytes_of(rank) long: checked. False if a
  // rank's is nowhere.
  template <typename BytesOf>
  bool locate(const std::vector<CallWords>& calls, std::size_t word, std::size_t alignment,
              BytesOf&& bytes_of, Pointers& pointers) const;
  // Copies the beginning of `input` to this rank's staging buffer.
  void stage(std::span<const std::byte> input) {
    if (input.empty()) return;
    std::memcpy(staging_.data(), input.data(), std::min(input.size(), kStagingBytes));
  }
  // Calls work(offset, bytes) for every chunk of `bytes`, once it is staged on all ranks that
  // stage; `work` ends with a meeting. staged: the first chunk is staged everywhere already.
  template <typename Work>
  void in_chunks(std::span<const std::byte> input, bool stages, bool staged, Work&& work) {
    for (std::size_t offset = 0; offset < input.size(); offset += kStagingBytes) {
      const auto chunk = input.subspan(offset, std::min(kStagingBytes, input.size() - offset));
      if (offset != 0 || !staged) {
        if (stages) stage(chunk);
        meeting_.meet();
      }
      work(offset, chunk.size());
    }
  }
  // This rank's slice of `count` elements: the plan's value, written to all results.
  void reduce_slice(const ReduceJob& job, const Pointers& slots, const Pointers& results,
                    std::size_t count);

  std::shared_ptr<Segment> segment_;
  const int rank_;
  const int size_;
  const std::uint64_t generation_;
  ArenaMemory memory_;
  Rendezvous meeting_;
  const Tree own_tree_;         // all_reduce: one virtual rank a rank
  std::unique_ptr<Tree> tree_;  // tree_all_reduce: the last layout's
  std::span<std::byte> staging_;
  Pointers stagings_;
  Pointers slots_;    // scratch of one operation
  Pointers results_;  // scratch of one operation
  Reducer reducer_;
};

std::uint64_t ShmGroup::place_of(std::span<const std::byte> memory, std::size_t alignment) const {
  if (memory.empty() || segment_->arena_owner(memory.data()) != rank_ ||
      segment_->arena_owner(&memory.back()) != rank_)
    return kNowhere;
  const auto offset = static_cast<std::uint64_t>(segment_->offset_of(memory.data()));
  return offset % alignment == 0 ? offset : kNowhere;
}

template <typename BytesOf>
bool ShmGroup::locate(const std::vector<CallWords>& calls, std::size_t word, std::size_t alignment,
                      BytesOf&& bytes_of, Pointers& pointers) const {
  pointers.assign(size_, nullptr);
  for (int rank = 0; rank < size_; ++rank) {
    const std::uint64_t place = calls[rank][word];
    const std::size_t bytes = bytes_of(rank);
    if (bytes == 0) continue;
    if (place == kNowhere) return false;
    if (place % alignment != 0)
      throw Error(fmt::format("rank {} named the misaligned offset {}", rank, place));
    pointers[rank] = segment_->at(rank, place, bytes).data();
  }
  return true;
}

void ShmGroup::reduce_slice(const ReduceJob& job, const Pointers& slots, const Pointers& results,
                            std::size_t count) {
  // Whole cache lines, so that no two ranks write to the same one.
  const std::size_t line = kCacheLine / size_of(job.dtype);
  const std::size_t share = (count + size_ - 1) / size_;
  const std::size_t slice = (share + line - 1) / line * line;
  const std::size_t first = std::min(count, rank_ * slice);
  reducer_.run(job, slots, results, first, std::min(count, first + slice));
}

void ShmGroup::broadcast(std::span<std::byte> data, Dtype dtype, int root,
                         const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::broadcast);
  check_root(root, size_);
  const bool is_root = rank_ == root;
  const std::uint64_t place = place_of(data, size_of(dtype));
  if (is_root && place == kNowhere) stage(data);
  const Call call{.operation = Operation::broadcast,
                  .dtype = dtype,
                  .root = root,
                  .count = count,
                  .place = place};
  run(call, options, data.size(), [&](const auto& calls) {
    const std::uint64_t source = calls[root][kPlaceWord];
    if (source != kNowhere && !data.empty()) {
      const auto from = segment_->at(root, source, data.size());
      if (!is_root) std::memcpy(data.data(), from.data(), data.size());
      meeting_.meet();
      return;
    }
    in_chunks(data, is_root, true, [&](std::size_t offset, std::size_t bytes) {
      if (!is_root) std::memcpy(data.data() + offset, stagings_[root], bytes);
      meeting_.meet();
    });
  });
}

void ShmGroup::all_gather(std::span<const std::byte> input, std::span<std::byte> output,
                          Dtype dtype, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::all_gather);
  check_gather(input, output, rank_, size_);
  const std::uint64_t place = place_of(input, size_of(dtype));
  if (place == kNowhere) stage(input);
  const Call call{
      .operation = Operation::all_gather, .dtype = dtype, .count = count, .place = place};
  run(call, options, input.size(), [&](const auto& calls) {
    const auto copy_out = [&](const Pointers& from, std::size_t offset, std::size_t bytes) {
      for (int i = 0; i < size_; ++i) {
        const int other = (rank_ + i) % size_;  // not all ranks read from the same one at once
        std::byte* to = output.data() + other * input.size() + offset;
        if (other != rank_)
          std::memcpy(to, from[other], bytes);
        else if (to != input.data() + offset)
          std::memcpy(to, input.data() + offset, bytes);
      }
      meeting_.meet();
    };
    if (input.empty()) return;
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return input.size(); }, slots_))
      return copy_out(slots_, 0, input.size());
    const bool staged = std::all_of(calls.begin(), calls.end(), [](const CallWords& words) {
      return words[kPlaceWord] == kNowhere;
    });
    in_chunks(input, true, staged,
              [&](std::size_t offset, std::size_t bytes) { copy_out(stagings_, offset, bytes); });
  });
}

void ShmGroup::all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                          const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::all_reduce);
  const std::uint64_t place = place_of(data, size_of(dtype));
  if (place == kNowhere) stage(data);
  const ReduceJob job{.plan = own_tree_.plan,
                      .dtype = dtype,
                      .reduction = reduction,
                      .round_once = true,
                      .slot_bytes = 0};
  const Call call{.operation = Operation::all_reduce,
                  .dtype = dtype,
                  .reduction = reduction,
                  .count = count,
                  .place = place};
  run(call, options, data.size(), [&](const auto& calls) {
    if (data.empty()) return;
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return data.size(); }, slots_)) {
      reduce_slice(job, slots_, slots_, count);
      meeting_.meet();
      return;
    }
    const bool staged = std::all_of(calls.begin(), calls.end(), [](const CallWords& words) {
      return words[kPlaceWord] == kNowhere;
    });
    in_chunks(data, true, staged, [&](std::size_t offset, std::size_t bytes) {
      reduce_slice(job, stagings_, stagings_, bytes / size_of(dtype));
      meeting_.meet();
      std::memcpy(data.data() + offset, staging_.data(), bytes);
    });
  });
}

void ShmGroup::tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                               const TreeLayout& layout, const CallOptions& options) {
  const std::uint64_t count = count_elements(result, dtype, Operation::tree_all_reduce);
  if (!tree_ || tree_->layout.runs != layout.runs ||
      tree_->layout.virtual_ranks != layout.virtual_ranks) {
    check_layout(layout, size_);
    tree_ = std::make_unique<Tree>(layout);
  }
  const Tree& tree = *tree_;
  check_tree(slots, result, dtype, tree.contributions[rank_]);
  const auto used = slots.first(tree.contributions[rank_] * result.size());
  const Call call{.operation = Operation::tree_all_reduce,
                  .dtype = dtype,
                  .virtual_ranks = layout.virtual_ranks,
                  .count = count,
                  .layout = tree.digest,
                  .place = place_of(used, size_of(dtype)),
                  .result_place = place_of(result, size_of(dtype))};
  if ((!used.empty() && call.place == kNowhere) ||
      (!result.empty() && call.result_place == kNowhere))
    throw ConfigError("tree_all_reduce: slots and result must come from the group's allocate()");
  const ReduceJob job{.plan = tree.plan,
                      .dtype = dtype,
                      .reduction = Reduction::sum,
                      .round_once = false,
                      .slot_bytes = result.size()};
  run(call, options, result.size(), [&](const auto& calls) {
    if (result.empty()) return;
    const auto slot_bytes = [&](int rank) { return tree.contributions[rank] * result.size(); };
    if (!locate(calls, kPlaceWord, size_of(dtype), slot_bytes, slots_) ||
        !locate(
            calls, kResultPlaceWord, size_of(dtype), [&](int) { return result.size(); }, results_))
      throw Error("a rank announced memory outside its arena");
    reduce_slice(job, slots_, results_, count);
    meeting_.meet();
  });
}

}  // namespace

std::unique_ptr<Group> make_shm_group(std::shared_ptr<Segment> segment, int rank,
                                      const GroupOptions& options) {
  return std::make_unique<ShmGroup>(std::move(segment), rank, options);
}

}  // namespace lockstep
