// A sum over virtual ranks in canonical order, in use: memory for this rank's contributions,
// merging them as they are computed, and the reduction over all ranks. T is float or double. One
// thread; all ranks construct and call it alike.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <span>
#include <string_view>

#include "lockstep/cluster/world.h"

namespace lockstep {

template <typename T>
class TreeSum {
 public:
  // Each virtual rank contributes `count` elements.
  TreeSum(const World& world, int virtual_ranks, std::size_t count, std::string_view what)
      : group_(world.group()),
        count_(count),
        layout_{partition_virtual_ranks(virtual_ranks, world.size()), virtual_ranks} {
    std::size_t slots = 1;  // symmetric memory: as many as any rank needs
    for (const VirtualRange& run : layout_.runs)
      slots =
          std::max(slots, static_cast<std::size_t>(plan_accumulation(run, virtual_ranks).slots));
    const VirtualRange mine = layout_.runs[static_cast<std::size_t>(world.rank())];
    plan_ = plan_accumulation(mine, virtual_ranks);
    contributions_ = static_cast<int>(maximal_subtrees(mine, virtual_ranks).size());
    memory_ = world.group().allocate(slots * count * sizeof(T), what);
  }

  const TreeLayout& layout() const { return layout_; }

  // Calls compute(virtual_rank, slot) for each of this rank's virtual ranks; compute fills the
  // whole slot.
  template <typename Compute>
  void accumulate(Compute compute) {
    for (const AccumulateStep& step : plan_.steps) {
      compute(step.virtual_rank, slot(step.slot));
      for (int top = step.slot; top > step.slot - step.merges; --top)
        std::ranges::transform(slot(top - 1), slot(top), slot(top - 1).begin(), std::plus<>());
    }
  }
  // What this rank contributes, after accumulate() and before reduce().
  int contributions() const { return contributions_; }
  std::span<T> slot(int index) const {
    return {reinterpret_cast<T*>(memory_.data()) + static_cast<std::size_t>(index) * count_,
            count_};
  }
  // The sum over all virtual ranks, on every rank; stands where slot 0 was.
  std::span<T> reduce(std::string_view tag) {
    constexpr Dtype dtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
    const std::size_t bytes = count_ * sizeof(T);
    group_.tree_all_reduce(memory_.first(static_cast<std::size_t>(contributions_) * bytes),
                           memory_.first(bytes), dtype, layout_, {.tag = tag});
    return slot(0);
  }

 private:
  Group& group_;
  std::size_t count_;
  TreeLayout layout_;
  AccumulatePlan plan_;
  int contributions_ = 0;
  std::span<std::byte> memory_;
};

}  // namespace lockstep
