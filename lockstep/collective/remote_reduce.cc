// Reductions across nodes.
#include <utility>

#include "lockstep/collective/kernels.h"
#include "lockstep/collective/remote_group.h"

namespace lockstep {
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
  all_reduce_by(plan_for(data.size(), dtype), data, dtype, reduction, options);
}

AllReducePlan RemoteGroup::plan_for(std::size_t bytes, Dtype dtype) {
  const bool in_frame = bytes <= RemoteMeeting::kMostInFrame;
  if (in_frame && goes_to_all(bytes)) return AllReducePlan::to_all;
  const PlanChoice choice =
      choose_all_reduce(meeting_.link()->costs, size_, bytes, options_.exact, in_frame);
  // Others round 16-bit types after every addition. MPI's saturates bytes (Open MPI 4.1).
  const bool rounds = (is_floating_point(dtype) && size_of(dtype) == 2) ||
                      (choice.plan == AllReducePlan::engine && size_of(dtype) < 4);
  const AllReducePlan plan =
      rounds && choice.plan != AllReducePlan::to_all ? AllReducePlan::direct : choice.plan;
  const unsigned bit = 1U << static_cast<int>(plan);
  if (options_.on_choice && plan == choice.plan && (std::exchange(told_, told_ | bit) & bit) == 0)
    options_.on_choice("all_reduce: " + choice.reason);
  return plan;
}

void RemoteGroup::all_reduce_by(AllReducePlan by, std::span<std::byte> data, Dtype dtype,
                                Reduction reduction, const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::all_reduce);
  const Call call{
      .operation = Operation::all_reduce, .dtype = dtype, .reduction = reduction, .count = count};
  DirectPlan plan = plan_of(own_tree_, dtype, reduction, data, data.size());
  using enum AllReducePlan;
  if (by == to_all)
    return reduce_whole(
        call, options, plan, data, data.size(), [&](int) { return data; },
        [&](int) { return data.size(); });
  if (by == direct) {
    plan.chunks = chunks_of(count, dtype);
    plan.own_sum = data.data() + plan.chunks[rank_].first * size_of(dtype);
    plan.sums = data.data();
    return reduce_directly(call, options, std::move(plan), data.size());
  }
  run(data.size(), [&] {
    meeting_.begin(call, options, Parcels(size_));
    const auto planner = by == doubling  ? plan_recursive_doubling
                         : by == halving ? plan_recursive_halving
                         : by == tree    ? plan_tree
                                         : plan_ring;
    if (by == engine)
      reduce_by_engine(data, dtype, reduction);
    else
      execute(planner(rank_, size_), data, dtype, reduction);
    if (reduction == Reduction::mean) kernels().divide(data.data(), dtype, size_, count);
  });
}

// Who has left had done its part.
void RemoteGroup::reduce_by_engine(std::span<std::byte> data, Dtype dtype, Reduction reduction) {
  using enum ReducingTransport::Combining;
  constexpr ReducingTransport::Combining kCombining[] = {sum, sum, min, max, product};
  const auto ticket = meeting_.all_reduce(data, dtype, kCombining[static_cast<int>(reduction)]);
  bool over = false;
  meeting_.await([&] { return over = over || meeting_.done(ticket); },
                 [&](int rank) { return !meeting_.has_left(rank); });
}

void RemoteGroup::execute(const Plan& plan, std::span<std::byte> data, Dtype dtype,
                          Reduction reduction) {
  const std::size_t element = size_of(dtype);
  scratch_.resize(std::max(scratch_.size(), data.size()));
  const BinaryKernel add = kernels().binary(dtype, reduction);
  const auto bytes_of = [&](ChunkRange range) {
    const Slice slice = slice_of(range, plan.chunks, data.size() / element, dtype);
    return data.subspan(slice.first * element, slice.size() * element);
  };
  for (const PlanStep& step : plan.steps) {
    using Then = PlanStep::Then;
    const auto own = bytes_of(step.receives), sends = bytes_of(step.sends);
    const auto in = step.then == Then::replace ? own : std::span(scratch_).first(own.size());
    std::vector<std::pair<int, RemoteMeeting::Ticket>> open;
    if (step.receive_from >= 0 && !own.empty())
      open.emplace_back(step.receive_from,
                        meeting_.receive(step.receive_from, RemoteMeeting::kData, in));
    if (step.send_to >= 0 && !sends.empty())
      open.emplace_back(step.send_to, meeting_.send(step.send_to, RemoteMeeting::kData, sends));
    meeting_.await_all(open);
    if (step.receive_from < 0 || step.then == Then::replace) continue;
    const bool is_first = step.then == Then::add_to_own;
    add(own.data(), is_first ? own.data() : in.data(), is_first ? in.data() : own.data(),
        own.size() / element);
  }
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
  if (!tree_ || tree_->layout != layout) {
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
