// The one order in which the contributions of V virtual ranks are added (DESIGN, "The canonical
// tree"):
//   tree(lo, hi) = tree(lo, mid) + tree(mid, hi),  mid - lo = the largest power of two below hi -
//   lo.
// Pure functions, no state; any thread.
#pragma once

#include <vector>

namespace lockstep {

// Virtual ranks [lo, hi).
struct VirtualRange {
  int lo = 0;
  int hi = 0;
  int size() const { return hi - lo; }
  bool operator==(const VirtualRange&) const = default;
};

// The largest power of two below hi - lo, added to lo. Requires hi - lo >= 2.
int split_point(VirtualRange node);

// The contiguous run of virtual ranks that each of `workers` workers computes: sizes differ by at
// most one... unless an aligned partition with fewer contributions exists at the same maximum load.
// Requires 1 <= workers <= virtual_ranks.
std::vector<VirtualRange> partition_virtual_ranks(int virtual_ranks, int workers);

// The maximal subtrees of tree(0, virtual_ranks) that lie inside `run`, from left to right. What a
// worker contributes.
std::vector<VirtualRange> maximal_subtrees(VirtualRange run, int virtual_ranks);

// How a worker accumulates its run with a stack of buffers: after computing virtual rank v into the
// slot on top of the stack, it merges the two topmost slots `merges` times (slot[top-1] +=
// slot[top]). The slots that remain at the end are exactly maximal_subtrees(run), in order.
struct AccumulateStep {
  int virtual_rank = 0;
  int slot = 0;    // where the contribution is computed
  int merges = 0;  // how often the two topmost slots merge afterwards
};
struct AccumulatePlan {
  std::vector<AccumulateStep> steps;
  int slots = 0;  // buffers needed at once
};
AccumulatePlan plan_accumulation(VirtualRange run, int virtual_ranks);

// How the contributions of all workers become tree(0, V): a program for a stack machine.
struct CombineStep {
  enum class Kind { push, add } kind = Kind::push;
  int rank = 0;  // push: slot `slot` of worker `rank`
  int slot = 0;
};
struct CombinePlan {
  std::vector<CombineStep> steps;
  int stack_depth = 0;
};
CombinePlan plan_combination(const std::vector<VirtualRange>& runs, int virtual_ranks);
// How the contributions of some neighbours, a node's ranks, become the maximal subtrees of what
// they have together: a plan for each, from left to right. `runs`: theirs; push.rank counts them.
std::vector<CombinePlan> plan_partial_combination(const std::vector<VirtualRange>& runs,
                                                  int virtual_ranks);

}  // namespace lockstep
