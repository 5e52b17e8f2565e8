#include "lockstep/collective/canonical_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>

namespace lockstep {
namespace {

constexpr int kMax = 64;

std::string added(const std::string& left, const std::string& right) {
  std::string text = "(";
  return text.append(left).append("+").append(right).append(")");
}

// The definition, in symbols: "((0+1)+2)".
std::string tree_text(VirtualRange node) {
  if (node.size() == 1) return std::to_string(node.lo);
  int half = 1;
  while (half * 2 < node.size()) half *= 2;
  return added(tree_text({node.lo, node.lo + half}), tree_text({node.lo + half, node.hi}));
}

bool is_node(VirtualRange wanted, VirtualRange node) {
  if (wanted == node) return true;
  if (node.size() == 1) return false;
  const int mid = split_point(node);
  return is_node(wanted,
                 wanted.hi <= mid ? VirtualRange{node.lo, mid} : VirtualRange{mid, node.hi});
}

// Runs an accumulation plan on symbols; returns the slots that remain.
std::vector<std::string> accumulate_symbols(const AccumulatePlan& plan) {
  std::vector<std::string> slots;
  for (const AccumulateStep& step : plan.steps) {
    EXPECT_EQ(step.slot, static_cast<int>(slots.size()));
    slots.push_back(std::to_string(step.virtual_rank));
    EXPECT_LE(static_cast<int>(slots.size()), plan.slots);
    for (int i = 0; i < step.merges; ++i) {
      const std::string top = slots.back();
      slots.pop_back();
      slots.back() = added(slots.back(), top);
    }
  }
  return slots;
}

// Runs a combination plan on the ranks' symbols.
std::string combine_symbols(const CombinePlan& plan,
                            const std::vector<std::vector<std::string>>& slots) {
  std::vector<std::string> stack;
  for (const CombineStep& step : plan.steps) {
    if (step.kind == CombineStep::Kind::push) {
      stack.push_back(slots.at(step.rank).at(step.slot));
      EXPECT_LE(static_cast<int>(stack.size()), plan.stack_depth);
    } else {
      const std::string top = stack.back();
      stack.pop_back();
      stack.back() = added(stack.back(), top);
    }
  }
  EXPECT_EQ(stack.size(), 1u);
  return stack.front();
}

TEST(CanonicalTreeTest, SplitsAtTheLargestPowerOfTwoBelow) {
  EXPECT_EQ(split_point({0, 2}), 1);
  EXPECT_EQ(split_point({0, 3}), 2);
  EXPECT_EQ(split_point({0, 4}), 2);
  EXPECT_EQ(split_point({4, 9}), 8);
  EXPECT_EQ(tree_text({0, 5}), "(((0+1)+(2+3))+4)");
}

TEST(CanonicalTreeTest, EveryRunAccumulatesToItsMaximalSubtrees) {
  for (int virtual_ranks = 1; virtual_ranks <= kMax; ++virtual_ranks) {
    for (int lo = 0; lo < virtual_ranks; ++lo) {
      for (int hi = lo; hi <= virtual_ranks; ++hi) {
        const auto subtrees = maximal_subtrees({lo, hi}, virtual_ranks);
        std::vector<std::string> expected;
        int next = lo;
        for (const VirtualRange subtree : subtrees) {
          ASSERT_EQ(subtree.lo, next);
          ASSERT_TRUE(is_node(subtree, {0, virtual_ranks}));
          next = subtree.hi;
          expected.push_back(tree_text(subtree));
        }
        ASSERT_EQ(next, hi);
        // Maximal: no two neighbours are the halves of a node.
        for (std::size_t i = 1; i < subtrees.size(); ++i) {
          const VirtualRange both{subtrees[i - 1].lo, subtrees[i].hi};
          ASSERT_FALSE(is_node(both, {0, virtual_ranks}) && split_point(both) == subtrees[i].lo);
        }
        const auto plan = plan_accumulation({lo, hi}, virtual_ranks);
        ASSERT_EQ(accumulate_symbols(plan), expected);
        for (std::size_t i = 0; i < plan.steps.size(); ++i)
          ASSERT_EQ(plan.steps[i].virtual_rank, lo + static_cast<int>(i));
      }
    }
  }
}

TEST(CanonicalTreeTest, EveryPartitionCombinesToTheSameTree) {
  for (int virtual_ranks = 1; virtual_ranks <= kMax; ++virtual_ranks) {
    for (int workers = 1; workers <= virtual_ranks; ++workers) {
      const auto runs = partition_virtual_ranks(virtual_ranks, workers);
      std::vector<std::vector<std::string>> slots;
      for (const VirtualRange run : runs)
        slots.push_back(accumulate_symbols(plan_accumulation(run, virtual_ranks)));
      ASSERT_EQ(combine_symbols(plan_combination(runs, virtual_ranks), slots),
                tree_text({0, virtual_ranks}))
          << virtual_ranks << " virtual ranks, " << workers << " workers";
    }
  }
}

// Nodes of any sizes: each adds up what its ranks have, and then all do.
TEST(CanonicalTreeTest, NodesOfAnySizesCombineToTheSameTree) {
  for (int virtual_ranks = 1; virtual_ranks <= kMax; ++virtual_ranks) {
    for (int workers = 1; workers <= std::min(virtual_ranks, 8); ++workers) {
      const auto runs = partition_virtual_ranks(virtual_ranks, workers);
      for (int cut = 0; cut < 1 << (workers - 1); ++cut) {  // its bits: where a node ends
        std::vector<VirtualRange> nodes;
        std::vector<std::vector<std::string>> reduced;
        for (int first = 0, rank = 0; rank < workers; ++rank) {
          if (rank + 1 < workers && (cut >> rank & 1) == 0) continue;
          const std::vector<VirtualRange> theirs(runs.begin() + first, runs.begin() + rank + 1);
          std::vector<std::vector<std::string>> slots;
          for (const VirtualRange run : theirs)
            slots.push_back(accumulate_symbols(plan_accumulation(run, virtual_ranks)));
          nodes.push_back({theirs.front().lo, theirs.back().hi});
          reduced.emplace_back();
          for (const CombinePlan& plan : plan_partial_combination(theirs, virtual_ranks))
            reduced.back().push_back(combine_symbols(plan, slots));
          first = rank + 1;
        }
        ASSERT_EQ(combine_symbols(plan_combination(nodes, virtual_ranks), reduced),
                  tree_text({0, virtual_ranks}))
            << virtual_ranks << " virtual ranks, " << workers << " workers, cut " << cut;
      }
    }
  }
}

TEST(CanonicalTreeTest, PartitionsAreContiguousCompleteAndAsEvenAsPossible) {
  for (int virtual_ranks = 1; virtual_ranks <= kMax; ++virtual_ranks) {
    for (int workers = 1; workers <= virtual_ranks; ++workers) {
      const auto runs = partition_virtual_ranks(virtual_ranks, workers);
      ASSERT_EQ(static_cast<int>(runs.size()), workers);
      int next = 0, largest = 0;
      for (const VirtualRange run : runs) {
        ASSERT_EQ(run.lo, next);
        ASSERT_GE(run.size(), 1);
        next = run.hi;
        largest = std::max(largest, run.size());
      }
      ASSERT_EQ(next, virtual_ranks);
      ASSERT_EQ(largest, (virtual_ranks + workers - 1) / workers);
    }
  }
}

// All partitions tried, for small numbers: none at the same maximum load contributes less.
TEST(CanonicalTreeTest, PartitionsContributeAsLittleAsPossible) {
  for (int virtual_ranks = 1; virtual_ranks <= 12; ++virtual_ranks) {
    for (int workers = 1; workers <= virtual_ranks; ++workers) {
      const int max_load = (virtual_ranks + workers - 1) / workers;
      std::size_t fewest = ~std::size_t{0};
      std::function<void(int, int, std::size_t)> search = [&](int left, int lo, std::size_t sum) {
        if (left == 0 && lo == virtual_ranks) fewest = std::min(fewest, sum);
        if (left == 0) return;
        for (int load = 1; load <= max_load && lo + load <= virtual_ranks; ++load)
          search(left - 1, lo + load,
                 sum + maximal_subtrees({lo, lo + load}, virtual_ranks).size());
      };
      search(workers, 0, 0);
      std::size_t found = 0;
      for (const VirtualRange run : partition_virtual_ranks(virtual_ranks, workers))
        found += maximal_subtrees(run, virtual_ranks).size();
      EXPECT_EQ(found, fewest) << virtual_ranks << " virtual ranks, " << workers << " workers";
    }
  }
}

TEST(CanonicalTreeTest, Examples) {
  using Runs = std::vector<VirtualRange>;
  EXPECT_EQ(partition_virtual_ranks(4, 3), (Runs{{0, 2}, {2, 3}, {3, 4}}));
  EXPECT_EQ(partition_virtual_ranks(4, 2), (Runs{{0, 2}, {2, 4}}));
  EXPECT_EQ(partition_virtual_ranks(8, 3), (Runs{{0, 3}, {3, 6}, {6, 8}}));
  EXPECT_EQ(maximal_subtrees({1, 4}, 4), (Runs{{1, 2}, {2, 4}}));
  EXPECT_EQ(maximal_subtrees({2, 2}, 4), Runs{});
}

TEST(CanonicalTreeDeathTest, RunsThatLeaveOutAVirtualRankAreABug) {
  EXPECT_DEATH(plan_combination({{0, 1}, {2, 3}}, 3), "leave out");
  EXPECT_DEATH(partition_virtual_ranks(2, 3), "check failed");
}

}  // namespace
}  // namespace lockstep
