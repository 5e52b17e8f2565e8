// Reductions of several ranks on each of several nodes.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "lockstep/base/error.h"
#include "lockstep/collective/hierarchical_group.h"
#include "lockstep/collective/kernels.h"

namespace lockstep {
namespace {

constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kMostSlice = 1 << 20;  // of a carrier: what is under way at a time

bool is_16_bit_float(Dtype dtype) { return dtype == Dtype::float16 || dtype == Dtype::bfloat16; }

// In every grouping that keeps the order, the same bits.
bool is_associative(Dtype dtype, Reduction reduction) {
  return !is_floating_point(dtype) || reduction == Reduction::min || reduction == Reduction::max;
}

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

// Whether these are the additions of ranks with one contribution each.
bool is_plain(const CombinePlan& plan, int ranks) {
  const CombinePlan other = plan_combination(one_each(ranks).runs, ranks);
  return std::ranges::equal(plan.steps, other.steps,
                            [](const CombineStep& x, const CombineStep& y) {
                              return x.kind == y.kind && x.rank == y.rank && x.slot == y.slot;
                            });
}

}  // namespace

NodeTree::NodeTree(TreeLayout layout, const std::vector<int>& firsts, int node)
    : all(std::move(layout)), nodes(layout_of_nodes(all.layout, firsts)) {
  plain = is_plain(nodes.plan, static_cast<int>(nodes.contributions.size()));
  const std::vector<VirtualRange> runs(all.layout.runs.begin() + firsts[node],
                                       all.layout.runs.begin() + firsts[node + 1]);
  locals.assign(all.contributions.begin() + firsts[node],
                all.contributions.begin() + firsts[node + 1]);
  subtrees = plan_partial_combination(runs, all.layout.virtual_ranks);
  plain_inside = subtrees.size() == 1 && is_plain(subtrees[0], static_cast<int>(locals.size()));
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
  std::vector<std::byte> elsewhere(rank_ == root ? 0 : data.size());
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
              .result = rank_ == root ? data : std::span(elsewhere)},
             data.size());
}

void HierarchicalGroup::reduce_scatter(std::span<const std::byte> input,
                                       std::span<std::byte> output, Dtype dtype,
                                       Reduction reduction, const CallOptions& options) {
  const std::uint64_t count = count_elements(output, dtype, Operation::reduce_scatter);
  check_parts(output, input, size_, -1, Operation::reduce_scatter);
  std::vector<std::byte> whole(input.size());
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
              .result = whole},
             input.size());
  std::copy_n(whole.begin() + rank_ * output.size(), output.size(), output.begin());
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

// What is left when all carriers have slices of whole cache lines travels with the calls.
void HierarchicalGroup::reduce_all(const Call& call, const CallOptions& options,
                                   const Reducing& what, std::uint64_t bytes) {
  const std::size_t element = size_of(what.dtype), count = what.result.size() / element;
  const std::size_t line = kLineBytes / element * carriers_;
  const std::size_t most = std::ranges::max(what.tree.all.contributions);
  const std::size_t apart = is_small(most * what.result.size()) ? 0 : count / line * line;
  const std::size_t tail = (count - apart) * element;
  std::vector<std::byte> payload;
  for (std::size_t slot = 0; slot * what.slot_bytes < what.slots.size(); ++slot) {
    const auto part = what.slots.subspan(slot * what.slot_bytes + apart * element, tail);
    payload.insert(payload.end(), part.begin(), part.end());
  }
  const Luggage luggage{.payload = payload,
                        .room = most * tail,
                        .answer = what.result.last(tail),
                        .make_answer = [&](const Payloads& payloads) {
                          std::byte* const to = what.result.data() + apart * element;
                          reducer_.run({.plan = what.tree.all.plan,
                                        .dtype = what.dtype,
                                        .reduction = what.reduction,
                                        .round_once = what.round_once,
                                        .slot_bytes = tail},
                                       payloads, std::span(&to, 1), 0, tail / element);
                        }};
  run(call, options, bytes, luggage, [&] {
    const std::size_t step = std::min<std::size_t>(apart / carriers_, kMostSlice / element);
    for (std::size_t first = 0; first < apart; first += step * carriers_)
      reduce_chunk(what, first, std::min(step, (apart - first) / carriers_));
  });
}

void HierarchicalGroup::reduce_chunk(const Reducing& what, std::size_t first, std::size_t slice) {
  // 16-bit types are rounded once, at the end, unless a worker that adds its own slots rounds, too.
  const bool widens = what.round_once && is_16_bit_float(what.dtype);
  const Dtype computed = widens ? Dtype::float32 : what.dtype;
  const std::size_t element = size_of(what.dtype);
  auto chunk = contributions_to(what, first, slice);
  if (widens) {
    const std::size_t count = slice * carriers_;
    const auto wide = room(wide_, count * sizeof(float));
    kernels().widen_to_float32(reinterpret_cast<float*>(wide.data()), chunk.data(), what.dtype,
                               count);
    chunk = wide;
  }
  const auto subtrees = combine_locally(what, computed, chunk, slice);
  std::span<std::byte> sum;
  if (carries()) {
    combine_nodes(what, computed, subtrees, slice);
    sum = subtrees.first(slice * size_of(computed));
    if (what.reduction == Reduction::mean) kernels().divide(sum.data(), computed, size_, slice);
    if (widens)
      kernels().round_from_float32(sum.data(), reinterpret_cast<const float*>(sum.data()),
                                   what.dtype, slice);
    sum = sum.first(slice * element);
  }
  const auto to = what.result.subspan(first * element, slice * carriers_ * element);
  if (carriers_ == local_size_) return groups_.local->all_gather(sum, to, what.dtype, inner());
  std::vector<std::uint64_t> counts(local_size_);
  std::fill_n(counts.begin(), carriers_, slice);
  groups_.local->all_gather_uneven(sum, to, counts, what.dtype, inner());
}

std::span<const std::byte> HierarchicalGroup::contributions_to(const Reducing& what,
                                                               std::size_t first,
                                                               std::size_t slice) {
  const std::size_t element = size_of(what.dtype), part = slice * element;
  const std::size_t contributions = what.tree.locals[local_rank_];
  if (contributions == 1) return what.slots.subspan(first * element, part * carriers_);
  const auto packed = room(packed_, contributions * part * carriers_);
  for (std::size_t carrier = 0, next = 0; carrier < static_cast<std::size_t>(carriers_); ++carrier)
    for (std::size_t slot = 0; slot < contributions; ++slot, next += part)
      std::memcpy(packed.data() + next,
                  what.slots.data() + slot * what.slot_bytes + first * element + carrier * part,
                  part);
  return packed;
}

std::span<std::byte> HierarchicalGroup::combine_locally(const Reducing& what, Dtype computed,
                                                        std::span<const std::byte> chunk,
                                                        std::size_t slice) {
  const NodeTree& tree = what.tree;
  const Reduction reduction = kernel_of(what.reduction);
  const std::size_t part = slice * size_of(computed);
  const bool in_any_order = is_associative(what.dtype, reduction);
  const std::size_t subtrees = in_any_order ? 1 : tree.subtrees.size();
  const auto parts = room(parts_, std::max<std::size_t>(subtrees, 1) * part);
  if ((in_any_order || tree.plain_inside) && carriers_ == local_size_ &&
      (what.round_once || !is_16_bit_float(what.dtype))) {
    groups_.local->reduce_scatter(chunk, parts.first(part), computed, reduction, inner());
    return parts;
  }
  // All contributions to a slice go to its carrier.
  std::vector<std::uint64_t> to(local_size_), from(local_size_);
  std::fill_n(to.begin(), carriers_, tree.locals[local_rank_] * slice);
  std::vector<const std::byte*> slots(local_size_);
  std::size_t all = 0;
  for (int rank = 0; rank < local_size_ && carries(); ++rank)
    all += from[rank] = tree.locals[rank] * slice;
  const auto gathered = room(gathered_, all * size_of(computed));
  groups_.local->all_to_all_uneven(chunk, to, gathered, from, computed, inner());
  if (!carries()) return parts;
  for (std::size_t rank = 0, next = 0; rank < slots.size(); next += from[rank++])
    slots[rank] = gathered.data() + next * size_of(computed);
  const CombinePlan in_order = plan_combination(one_each(local_size_).runs, local_size_);
  for (std::size_t subtree = 0; subtree < subtrees; ++subtree) {
    std::byte* const result = parts.data() + subtree * part;
    reducer_.run({.plan = in_any_order ? in_order : tree.subtrees[subtree],
                  .dtype = computed,
                  .reduction = reduction,
                  .round_once = what.round_once,
                  .slot_bytes = part},
                 slots, std::span(&result, 1), 0, slice);
  }
  return parts;
}

void HierarchicalGroup::combine_nodes(const Reducing& what, Dtype computed,
                                      std::span<std::byte> subtrees, std::size_t slice) {
  const Tree& nodes = what.tree.nodes;
  const Reduction reduction = kernel_of(what.reduction);
  const std::size_t part = slice * size_of(computed);
  const auto result = subtrees.first(part);
  if (what.round_once && (what.tree.plain || is_associative(what.dtype, reduction)))
    return groups_.carriers->all_reduce(result, computed, reduction, inner());
  const auto contributed = subtrees.first(nodes.contributions[node_] * part);
  if (reduction == Reduction::sum) {
    groups_.carriers->tree_all_reduce(contributed, result, computed, nodes.layout, inner());
    return;
  }
  // A product, of which no group knows the tree of many contributions a rank.
  std::vector<std::uint64_t> counts;
  for (const std::size_t contributions : nodes.contributions)
    counts.push_back(contributions * slice);
  const auto all = room(
      gathered_, std::accumulate(counts.begin(), counts.end(), std::size_t{0}) * size_of(computed));
  groups_.carriers->all_gather_uneven(contributed, all, counts, computed, inner());
  std::vector<const std::byte*> slots;
  for (std::size_t next = 0; const std::uint64_t count : counts) {
    slots.push_back(all.data() + next);
    next += count * size_of(computed);
  }
  std::byte* const to = result.data();
  reducer_.run({.plan = nodes.plan,
                .dtype = computed,
                .reduction = reduction,
                .round_once = what.round_once,
                .slot_bytes = part},
               slots, std::span(&to, 1), 0, slice);
}

}  // namespace lockstep
