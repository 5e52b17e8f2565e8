#include "lockstep/collective/canonical_tree.h"

#include <algorithm>
#include <bit>
#include <map>
#include <utility>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

std::pair<VirtualRange, VirtualRange> children(VirtualRange node) {
  const int mid = split_point(node);
  return {{node.lo, mid}, {mid, node.hi}};
}

void collect_subtrees(VirtualRange node, VirtualRange run, std::vector<VirtualRange>& out) {
  if (node.hi <= run.lo || run.hi <= node.lo) return;
  if (run.lo <= node.lo && node.hi <= run.hi) {
    out.push_back(node);
    return;
  }
  const auto [left, right] = children(node);
  collect_subtrees(left, run, out);
  collect_subtrees(right, run, out);
}

void accumulate(VirtualRange node, int slot, AccumulatePlan& plan) {
  if (node.size() == 1) {
    plan.steps.push_back({.virtual_rank = node.lo, .slot = slot});
    plan.slots = std::max(plan.slots, slot + 1);
    return;
  }
  const auto [left, right] = children(node);
  accumulate(left, slot, plan);
  accumulate(right, slot + 1, plan);
  ++plan.steps.back().merges;
}

using Contributions = std::map<std::pair<int, int>, CombineStep>;

// Returns the depth of stack it needs.
int combine(VirtualRange node, const Contributions& contributions, CombinePlan& plan) {
  if (const auto found = contributions.find({node.lo, node.hi}); found != contributions.end()) {
    plan.steps.push_back(found->second);
    return 1;
  }
  LOCKSTEP_CHECK(node.size() >= 2, "the runs leave out a virtual rank");
  const auto [left, right] = children(node);
  const int left_depth = combine(left, contributions, plan);
  const int right_depth = combine(right, contributions, plan);
  plan.steps.push_back({.kind = CombineStep::Kind::add});
  return std::max(left_depth, right_depth + 1);
}

// How good a partition is: fewer contributions first, then evener loads.
struct Cost {
  long contributions = 0;
  long squared_loads = 0;
  auto operator<=>(const Cost&) const = default;
};

}  // namespace

int split_point(VirtualRange node) {
  LOCKSTEP_CHECK(node.size() >= 2);
  return node.lo + static_cast<int>(std::bit_floor(static_cast<unsigned>(node.size() - 1)));
}

std::vector<VirtualRange> partition_virtual_ranks(int virtual_ranks, int workers) {
  LOCKSTEP_CHECK(1 <= workers && workers <= virtual_ranks);
  const int max_load = (virtual_ranks + workers - 1) / workers;
  // best[w][v]: the best way for workers w, w + 1, … to share [v, virtual_ranks); dynamic
  // programming from the last worker to the first. take[w][v] is what w takes then.
  std::vector<long> contributions(static_cast<std::size_t>(virtual_ranks) * (max_load + 1));
  for (int lo = 0; lo < virtual_ranks; ++lo)
    for (int load = 1; load <= std::min(max_load, virtual_ranks - lo); ++load)
      contributions[lo * (max_load + 1) + load] =
          static_cast<long>(maximal_subtrees({lo, lo + load}, virtual_ranks).size());
  const Cost impossible{.contributions = 1L << 40};
  std::vector<Cost> best(virtual_ranks + 1, impossible);
  best[virtual_ranks] = {};
  std::vector<std::vector<int>> take(workers, std::vector<int>(virtual_ranks + 1, 0));
  for (int worker = workers - 1; worker >= 0; --worker) {
    std::vector<Cost> next(virtual_ranks + 1, impossible);
    for (int lo = 0; lo < virtual_ranks; ++lo) {
      for (int load = std::min(max_load, virtual_ranks - lo); load >= 1; --load) {
        Cost cost = best[lo + load];
        if (cost == impossible) continue;
        cost.contributions += contributions[lo * (max_load + 1) + load];
        cost.squared_loads += static_cast<long>(load) * load;
        if (cost < next[lo]) {
          next[lo] = cost;
          take[worker][lo] = load;
        }
      }
    }
    best = std::move(next);
  }
  std::vector<VirtualRange> runs;
  for (int worker = 0, lo = 0; worker < workers; ++worker) {
    runs.push_back({lo, lo + take[worker][lo]});
    lo = runs.back().hi;
  }
  return runs;
}

std::vector<VirtualRange> maximal_subtrees(VirtualRange run, int virtual_ranks) {
  std::vector<VirtualRange> subtrees;
  collect_subtrees({0, virtual_ranks}, run, subtrees);
  return subtrees;
}

AccumulatePlan plan_accumulation(VirtualRange run, int virtual_ranks) {
  AccumulatePlan plan;
  int slot = 0;
  for (const VirtualRange subtree : maximal_subtrees(run, virtual_ranks))
    accumulate(subtree, slot++, plan);
  return plan;
}

CombinePlan plan_combination(const std::vector<VirtualRange>& runs, int virtual_ranks) {
  std::vector<CombinePlan> plans = plan_partial_combination(runs, virtual_ranks);
  LOCKSTEP_CHECK(plans.size() == 1 && runs.front().lo == 0 && runs.back().hi == virtual_ranks,
                 "the runs leave out a virtual rank");
  return std::move(plans.front());
}

std::vector<CombinePlan> plan_partial_combination(const std::vector<VirtualRange>& runs,
                                                  int virtual_ranks) {
  Contributions contributions;
  for (std::size_t rank = 0; rank < runs.size(); ++rank) {
    const auto subtrees = maximal_subtrees(runs[rank], virtual_ranks);
    for (std::size_t slot = 0; slot < subtrees.size(); ++slot)
      contributions[{subtrees[slot].lo, subtrees[slot].hi}] = {.rank = static_cast<int>(rank),
                                                               .slot = static_cast<int>(slot)};
  }
  std::vector<CombinePlan> plans;
  for (const VirtualRange subtree :
       maximal_subtrees({runs.front().lo, runs.back().hi}, virtual_ranks)) {
    CombinePlan& plan = plans.emplace_back();
    plan.stack_depth = combine(subtree, contributions, plan);
  }
  return plans;
}

}  // namespace lockstep
