// Reductions of several ranks on each of several nodes.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "lockstep/base/error.h"
#include "lockstep/collective/hierarchical_group.h"
#include "lockstep/collective/kernels.h"

namespace lockstep {
namespace {

constexpr std::size_t kStagingBytes = 8 << 20;
constexpr std::size_t kLeastStep = 64;  // elements

// Division comes at the end.
Reduction kernel_of(Reduction reduction) {
  return reduction == Reduction::mean ? Reduction::sum : reduction;
}

TreeLayout layout_of_nodes(const TreeLayout& layout, const std::vector<int>& firsts) {
  TreeLayout nodes{.runs = {}, .virtual_ranks = layout.virtual_ranks};
  for (std::size_t node = 0; node + 1 < firsts.size(); ++node)
    nodes.runs.push_back({layout.runs[firsts[node]].lo, layout.runs[firsts[node + 1] - 1].hi});
  return nodes;
}

}  // namespace

NodeTree::NodeTree(TreeLayout layout, const std::vector<int>& firsts, int node)
    : all(std::move(layout)), nodes(layout_of_nodes(all.layout, firsts)) {
  const std::vector<VirtualRange> runs(all.layout.runs.begin() + firsts[node],
                                       all.layout.runs.begin() + firsts[node + 1]);
  locals.assign(all.contributions.begin() + firsts[node],
                all.contributions.begin() + firsts[node + 1]);
  subtrees = plan_partial_combination(runs, all.layout.virtual_ranks);
}

void HierarchicalGroup::all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                                   const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::all_reduce);
  reduce_all(
      {.operation = Operation::all_reduce, .dtype = dtype, .reduction = reduction, .count = count},
      options,
      {.tree = *own_tree_,
       .dtype = dtype,
       .reduction = reduction,
       .round_once = true,
       .slots = data,
       .slot_bytes = data.size(),
       .result = data},
      data.size());
}

void HierarchicalGroup::reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                               int root, const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::reduce);
  check_root(root, size_, Operation::reduce);
  reduce_all({.operation = Operation::reduce,
              .dtype = dtype,
              .reduction = reduction,
              .root = root,
              .count = count},
             options,
             {.tree = *own_tree_,
              .dtype = dtype,
              .reduction = reduction,
              .round_once = true,
              .slots = data,
              .slot_bytes = data.size(),
              .result = rank_ == root ? data : std::span<std::byte>(),
              .root = root},
             data.size());
}

void HierarchicalGroup::reduce_scatter(std::span<const std::byte> input,
                                       std::span<std::byte> output, Dtype dtype,
                                       Reduction reduction, const CallOptions& options) {
  const std::uint64_t count = count_elements(output, dtype, Operation::reduce_scatter);
  check_parts(output, input, size_, -1, Operation::reduce_scatter);
  reduce_all({.operation = Operation::reduce_scatter,
              .dtype = dtype,
              .reduction = reduction,
              .count = count},
             options,
             {.tree = *own_tree_,
              .dtype = dtype,
              .reduction = reduction,
              .round_once = true,
              .slots = input,
              .slot_bytes = input.size(),
              .result = output,
              .root = Reducing::kParts},
             input.size());
}

void HierarchicalGroup::tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result,
                                        Dtype dtype, const TreeLayout& layout,
                                        const CallOptions& options) {
  const std::uint64_t count = count_elements(result, dtype, Operation::tree_all_reduce);
  if (!tree_ || tree_->all.layout != layout) {
    check_layout(layout, size_);
    tree_ = std::make_unique<NodeTree>(layout, firsts_, node_);
  }
  const std::size_t contributions = tree_->all.contributions[rank_];
  check_tree(slots, result, dtype, contributions);
  reduce_all({.operation = Operation::tree_all_reduce,
              .dtype = dtype,
              .virtual_ranks = layout.virtual_ranks,
              .count = count,
              .layout = tree_->all.digest},
             options,
             {.tree = *tree_,
              .dtype = dtype,
              .reduction = Reduction::sum,
              .round_once = false,
              .slots = slots.first(contributions * result.size()),
              .slot_bytes = result.size(),
              .result = result},
             result.size());
}

void HierarchicalGroup::reduce_all(const Call& call, const CallOptions& options,
                                   const Reducing& what, std::uint64_t bytes) {
  const std::size_t element = size_of(what.dtype), count = what.slot_bytes / element;
  const std::size_t most = std::ranges::max(what.tree.all.contributions);
  if (is_small(most * what.slot_bytes)) {
    std::vector<std::byte> sums(what.slot_bytes);
    std::byte* const to = sums.data();
    run(call, options, bytes,
        {.payload = what.slots,
         .room = most * what.slot_bytes,
         .answer = sums,
         .make_answer = [&](const Payloads& payloads) {
           reducer_.run({.plan = what.tree.all.plan,
                         .dtype = what.dtype,
                         .reduction = what.reduction,
                         .round_once = what.round_once,
                         .slot_bytes = what.slot_bytes},
                        payloads, std::span(&to, 1), 0, count);
         }});
    const Slice mine = windows_of(what, count)[local_rank_];
    std::copy_n(to + mine.first * element, mine.size() * element, what.result.begin());
    return;
  }
  const auto is_reachable = [&](std::span<const std::byte> memory) {
    return reachable_ == nullptr || reachable_->is_reachable(memory, what.dtype);
  };
  // All ranks of all nodes take the same way.
  std::byte in_place{is_reachable(what.slots) && is_reachable(what.result)};
  run(call, options, bytes,
      {.payload = std::span(&in_place, 1),
       .room = 1,
       .answer = std::span(&in_place, 1),
       .make_answer =
           [&](const Payloads& payloads) {
             for (const std::byte* const theirs : payloads) in_place &= *theirs;
           }},
      [&] { in_place == std::byte{1} ? reduce_in_place(what) : reduce_staged(what); });
}

std::vector<Slice> HierarchicalGroup::windows_of(const Reducing& what, std::size_t count) const {
  std::vector<Slice> windows;
  const std::size_t part = count / size_;
  for (int rank = firsts_[node_]; rank < firsts_[node_ + 1]; ++rank)
    windows.push_back(what.root == Reducing::kParts ? Slice{rank * part, (rank + 1) * part}
                      : what.root == Reducing::kAll || what.root == rank ? Slice{0, count}
                                                                         : Slice{});
  return windows;
}

std::vector<std::span<std::byte>> HierarchicalGroup::reach(std::span<const std::byte> mine,
                                                           Dtype dtype) {
  if (reachable_ != nullptr) return reachable_->reach(mine, dtype, inner());
  return {{const_cast<std::byte*>(mine.data()), mine.size()}};
}

void HierarchicalGroup::reduce_in_place(const Reducing& what) {
  const auto slots = reach(what.slots, what.dtype), results = reach(what.result, what.dtype);
  Reached reached{.count = what.slot_bytes / size_of(what.dtype), .slot_bytes = what.slot_bytes};
  reached.windows = windows_of(what, reached.count);
  for (int rank = 0; rank < local_size_; ++rank) {
    if (slots[rank].size() != what.tree.locals[rank] * what.slot_bytes ||
        results[rank].size() != reached.windows[rank].size() * size_of(what.dtype))
      throw Error(fmt::format("rank {} named memory of a wrong size", firsts_[node_] + rank));
    reached.slots.push_back(slots[rank].data());
    reached.results.push_back(results[rank].data());
  }
  reduce_reached(what, reached);
}

// In steps: of the whole, or of every rank's part. The sums take the contributions' place. What a
// carrier reduces itself of its own memory stays there, where that is possible.
void HierarchicalGroup::reduce_staged(const Reducing& what) {
  const bool in_parts = what.root == Reducing::kParts;
  const std::size_t parts = in_parts ? size_ : 1, element = size_of(what.dtype);
  const std::size_t most = std::ranges::max(what.tree.all.contributions);
  const std::size_t count = what.slot_bytes / element / parts;
  const std::size_t fits = kStagingBytes / element / parts / most / kLeastStep * kLeastStep;
  const std::size_t step = std::max(fits, kLeastStep), bytes = step * parts * most * element;
  if (staging_.size() < bytes)
    staging_ = groups_.local->allocate(std::max(bytes, kStagingBytes), "the groups' staging");
  const bool keeps_own = !in_parts && most == 1;
  for (std::size_t first = 0; first < count; first += step) {
    const std::size_t size = std::min(step, count - first);
    Reached reached{.count = size * parts, .slot_bytes = size * parts * element};
    reached.windows = windows_of(what, reached.count);
    const Slice own = keeps_own && carries()
                          ? slice_of({local_rank_, local_rank_ + 1}, carriers_, size, what.dtype)
                          : Slice{size, size};
    const auto copy = [&](std::byte* to, const std::byte* from) {
      std::memcpy(to, from, own.first * element);
      std::memcpy(to + own.last * element, from + own.last * element, (size - own.last) * element);
    };
    for (std::size_t slot = 0; slot < what.tree.locals[local_rank_]; ++slot)
      for (std::size_t part = 0; part < parts; ++part)
        copy(staging_.data() + slot * reached.slot_bytes + part * size * element,
             what.slots.data() + slot * what.slot_bytes + (part * count + first) * element);
    for (const auto stage : reach(staging_.first(bytes), what.dtype)) {
      reached.results.push_back(stage.data() +
                                reached.windows[reached.slots.size()].first * element);
      reached.slots.push_back(stage.data());
    }
    const std::byte* const sums = reached.results[local_rank_];
    std::byte* const result = what.result.empty() ? nullptr : &what.result[first * element];
    if (keeps_own) {
      reached.slots[local_rank_] = what.slots.data() + first * element;
      reached.results[local_rank_] = result;
    }
    reduce_reached(what, reached);
    if (result != nullptr) copy(result, sums);
  }
}

// 16-bit types are added in float32 and rounded once, at the end, unless a worker that adds its own
// slots rounds, too.
Dtype HierarchicalGroup::computed_as(const Reducing& what) {
  const bool widens =
      what.round_once && (what.dtype == Dtype::float16 || what.dtype == Dtype::bfloat16);
  return widens ? Dtype::float32 : what.dtype;
}

void HierarchicalGroup::contribute(const Reducing& what, const Reached& reached, Slice piece,
                                   std::byte* to, std::size_t stride) {
  const Dtype computed = computed_as(what);
  const bool widens = computed != what.dtype;
  const auto wide = room(wide_, widens ? local_size_ * piece.size() * sizeof(float) : 0);
  std::vector<const std::byte*> slots;
  for (int rank = 0; rank < local_size_; ++rank) {
    slots.push_back(reached.slots[rank] + piece.first * size_of(what.dtype));
    if (!widens) continue;
    auto* const own = reinterpret_cast<float*>(wide.data()) + rank * piece.size();
    kernels().widen_to_float32(own, slots[rank], what.dtype, piece.size());
    slots[rank] = reinterpret_cast<const std::byte*>(own);
  }
  for (const CombinePlan& subtree : what.tree.subtrees) {
    reducer_.run({.plan = subtree,
                  .dtype = computed,
                  .reduction = kernel_of(what.reduction),
                  .round_once = what.round_once,
                  .slot_bytes = reached.slot_bytes},
                 slots, std::span(&to, 1), 0, piece.size());
    to += stride;
  }
}

void HierarchicalGroup::deliver(const Reducing& what, const Reached& reached, Slice piece,
                                const std::byte* sum) {
  const Dtype computed = computed_as(what);
  const std::size_t element = size_of(what.dtype);
  for (int rank = 0; rank < local_size_; ++rank) {
    const Slice window = reached.windows[rank];
    const std::size_t first = std::max(piece.first, window.first);
    const std::size_t last = std::min(piece.last, window.last);
    if (first >= last) continue;
    std::byte* const to = reached.results[rank] + (first - window.first) * element;
    const std::byte* const from = sum + (first - piece.first) * size_of(computed);
    if (computed != what.dtype)
      kernels().round_from_float32(to, reinterpret_cast<const float*>(from), what.dtype,
                                   last - first);
    else if (to != from)
      std::memcpy(to, from, (last - first) * element);
  }
}

void HierarchicalGroup::reduce_reached(const Reducing& what, const Reached& reached) {
  if (carries()) {
    DirectPlan plan{.tree = what.tree.nodes,
                    .dtype = computed_as(what),
                    .reduction = kernel_of(what.reduction),
                    .round_once = what.round_once,
                    .divisor = what.reduction == Reduction::mean ? size_ : 1};
    plan.contribute = [&](Slice piece, std::byte* to, std::size_t stride) {
      contribute(what, reached, piece, to, stride);
    };
    plan.deliver = [&](Slice piece, const std::byte* sum) { deliver(what, reached, piece, sum); };
    const auto cut = [&](Slice whole, int number, int of) {
      const Slice in = slice_of({number, number + 1}, of, whole.size(), what.dtype);
      return Slice{whole.first + in.first, whole.first + in.last};
    };
    const Slice mine = cut({0, reached.count}, local_rank_, carriers_);
    const bool in_parts = what.root == Reducing::kParts;
    const std::size_t part = reached.count / size_;
    for (int node = 0; node < nodes_; ++node)
      plan.chunks.push_back(
          in_parts ? cut({firsts_[node] * part, firsts_[node + 1] * part}, local_rank_, carriers_)
                   : cut(mine, node, nodes_));
    plan.to = in_parts                      ? DirectPlan::kNobody
              : what.root == Reducing::kAll ? DirectPlan::kEverybody
                                            : node_of(what.root);
    // What can come to where it belongs is copied to the others from there.
    if (plan.dtype == what.dtype && reached.windows[local_rank_].size() == reached.count) {
      plan.sums = reached.results[local_rank_];
      plan.own_sum = plan.sums + plan.chunks[node_].first * size_of(what.dtype);
    }
    const Call call{.operation = Operation::all_reduce,
                    .dtype = plan.dtype,
                    .reduction = plan.reduction,
                    .count = reached.count};
    across_->reduce_directly(call, inner(), std::move(plan), reached.slot_bytes);
  }
  groups_.local->barrier(inner());
}

}  // namespace lockstep
