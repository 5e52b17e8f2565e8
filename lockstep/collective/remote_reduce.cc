// Reductions across nodes.
#include "lockstep/collective/remote_group.h"

namespace lockstep {
namespace {

constexpr int kEverybody = DirectPlan::kEverybody;

}  // namespace

template <typename OutOf, typename InBytes>
void RemoteGroup::reduce_whole(const Call& call, const CallOptions& options, const DirectPlan& plan,
                               std::span<std::byte> result, std::uint64_t bytes, OutOf&& out_of,
                               InBytes&& in_bytes) {
  run(bytes, [&] {
    Parcels parcels(size_);
    std::size_t all = 0;
    for (int rank = 0; rank < size_; ++rank)
      if (rank != rank_) all += in_bytes(rank);
    scratch_.resize(std::max(scratch_.size(), all));
    std::vector<const std::byte*> slots(size_);
    std::size_t next = 0;
    for (int rank = 0; rank < size_; ++rank) {
      slots[rank] = rank == rank_ ? plan.slots.data() : scratch_.data() + next;
      if (rank == rank_) continue;
      parcels.out[rank] = out_of(rank);
      parcels.in[rank] = std::span(scratch_).subspan(next, in_bytes(rank));
      next += in_bytes(rank);
    }
    meeting_.begin(call, options, parcels);
    meeting_.carry(parcels);
    const ReduceJob job{.plan = plan.tree.plan,
                        .dtype = plan.dtype,
                        .reduction = plan.reduction,
                        .round_once = plan.round_once,
                        .slot_bytes = plan.slot_bytes};
    std::byte* const to = result.data();
    if (!result.empty())
      reducer_.run(job, slots, std::span(&to, 1), 0, result.size() / size_of(plan.dtype));
  });
}

void RemoteGroup::reduce_directly(const Call& call, const CallOptions& options, DirectPlan plan,
                                  std::uint64_t bytes) {
  run(bytes, [&] {
    meeting_.begin(call, options, Parcels(size_));
    DirectReduction reduction(meeting_, reducer_, scratch_, std::move(plan), rank_);
    while (!reduction.is_done())
      meeting_.await([&] { return reduction.advance() || reduction.is_done(); },
                     [&](int rank) { return reduction.waits_for(rank); });
  });
}

std::vector<Slice> RemoteGroup::chunks_of(std::size_t count, Dtype dtype) const {
  std::vector<Slice> chunks;
  for (int owner = 0; owner < size_; ++owner)
    chunks.push_back(slice_of({owner, owner + 1}, size_, count, dtype));
  return chunks;
}

bool RemoteGroup::goes_to_all(std::size_t bytes) const {
  return bytes * static_cast<std::size_t>(size_ - 1) <= kMostToAll;
}

void RemoteGroup::all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                             const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::all_reduce);
  const Call call{
      .operation = Operation::all_reduce, .dtype = dtype, .reduction = reduction, .count = count};
  DirectPlan plan = plan_of(own_tree_, dtype, reduction, data, data.size());
  if (goes_to_all(data.size()))
    return reduce_whole(
        call, options, plan, data, data.size(), [&](int) { return data; },
        [&](int) { return data.size(); });
  plan.chunks = chunks_of(count, dtype);
  plan.own_sum = data.data() + plan.chunks[rank_].first * size_of(dtype);
  plan.sums = data.data();
  reduce_directly(call, options, std::move(plan), data.size());
}

void RemoteGroup::reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction, int root,
                         const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::reduce);
  check_root(root, size_, Operation::reduce);
  const Call call{.operation = Operation::reduce,
                  .dtype = dtype,
                  .reduction = reduction,
                  .root = root,
                  .count = count};
  const bool is_root = rank_ == root;
  DirectPlan plan = plan_of(own_tree_, dtype, reduction, data, data.size());
  if (goes_to_all(data.size()))
    return reduce_whole(
        call, options, plan, is_root ? data : std::span<std::byte>(), data.size(),
        [&](int rank) { return rank == root ? data : std::span<std::byte>(); },
        [&](int) { return is_root ? data.size() : 0; });
  plan.chunks = chunks_of(count, dtype);
  if (is_root) plan.own_sum = data.data() + plan.chunks[rank_].first * size_of(dtype);
  if (is_root) plan.sums = data.data();
  plan.to = root;
  reduce_directly(call, options, std::move(plan), data.size());
}

void RemoteGroup::reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output,
                                 Dtype dtype, Reduction reduction, const CallOptions& options) {
  const std::uint64_t count = count_elements(output, dtype, Operation::reduce_scatter);
  check_parts(output, input, size_, -1, Operation::reduce_scatter);
  const Call call{.operation = Operation::reduce_scatter,
                  .dtype = dtype,
                  .reduction = reduction,
                  .count = count};
  const auto part = [&](int rank) { return input.subspan(rank * output.size(), output.size()); };
  if (goes_to_all(output.size()))
    return reduce_whole(call, options,
                        plan_of(own_tree_, dtype, reduction, part(rank_), output.size()), output,
                        input.size(), part, [&](int) { return output.size(); });
  DirectPlan plan = plan_of(own_tree_, dtype, reduction, input, input.size());
  for (std::size_t rank = 0; rank < static_cast<std::size_t>(size_); ++rank)
    plan.chunks.push_back({rank * count, (rank + 1) * count});
  plan.own_sum = output.data();
  plan.to = DirectPlan::kNobody;
  reduce_directly(call, options, std::move(plan), input.size());
}

void RemoteGroup::tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result,
                                  Dtype dtype, const TreeLayout& layout,
                                  const CallOptions& options) {
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
                  .layout = tree.digest};
  DirectPlan plan = plan_of(tree, dtype, Reduction::sum, used, result.size());
  plan.round_once = false;
  if (goes_to_all(result.size()))
    return reduce_whole(
        call, options, plan, result, result.size(), [&](int) { return used; },
        [&](int rank) { return tree.contributions[rank] * result.size(); });
  plan.chunks = chunks_of(count, dtype);
  plan.own_sum = result.data() + plan.chunks[rank_].first * size_of(dtype);
  plan.sums = result.data();
  reduce_directly(call, options, std::move(plan), result.size());
}

}  // namespace lockstep
