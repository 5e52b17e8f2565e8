// What only groups of several ranks on several nodes have: much data on nodes of any sizes, errors
// that end the groups below. What every group does, conformance_test.cc holds them to.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <barrier>

#include "lockstep/collective/backends_test.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::HasSubstr;

using Shape = std::vector<int>;
const Shape kShapes[] = {{2, 2}, {3, 1}, {2, 1, 2}, {1, 3}};
// Several slices for each carrier, with a rest that is no whole cache line.
constexpr std::size_t kCount = 40'003;

void for_shapes(const Body& body) {
  for (const Shape& shape : kShapes)
    run_nodes(shape, [&](const NodeGroups& groups) {
      body(*make_hierarchical_group(groups, {.timeout = kTestTimeout}));
    });
}

TEST(HierarchicalTest, MuchDataHasTheCanonicalSumsOnAllNodes) {
  for_shapes([](Group& group) {
    const auto check = [&]<typename T>(T, Dtype dtype, Reduction reduction) {
      const int rank = group.rank(), root = group.size() - 1;
      const std::size_t part = kCount / group.size(), bytes = part * sizeof(T);
      const auto input = naive::inputs<T>(rank, kCount);
      const auto expected = naive::reduced<T>(group.size(), kCount, reduction);
      for (const Memory memory : {Memory::arena, Memory::ordinary}) {
        SCOPED_TRACE(fmt::format("{} {}, rank {}, {}", name_of(dtype), name_of(reduction), rank,
                                 memory == Memory::arena ? "arena" : "ordinary"));
        Buffer data(group, memory, input.size()), own(group, memory, bytes);
        data.set(input);
        group.reduce(data.bytes(), dtype, reduction, root);
        EXPECT_TRUE(data.get() == (rank == root ? expected : input));
        data.set(input);
        group.reduce_scatter(data.bytes().first(bytes * group.size()), own.bytes(), dtype,
                             reduction);
        EXPECT_TRUE(
            std::ranges::equal(own.bytes(), std::span(expected).subspan(rank * bytes, bytes)));
        EXPECT_TRUE(data.get() == input);
        group.all_reduce(data.bytes(), dtype, reduction);
        EXPECT_TRUE(data.get() == expected);
      }
    };
    check(float{}, Dtype::float32, Reduction::sum);
    check(float{}, Dtype::float32, Reduction::product);
    check(float{}, Dtype::float32, Reduction::min);
    check(naive::Bfloat16{}, Dtype::bfloat16, Reduction::mean);
    check(naive::Float16{}, Dtype::float16, Reduction::max);
    check(std::int32_t{}, Dtype::int32, Reduction::mean);
  });
}

TEST(HierarchicalTest, TheTreeOfManyVirtualRanks) {
  for_shapes([](Group& group) {
    for (const int virtual_ranks : {group.size(), 7, 9}) {
      const TreeLayout layout{partition_virtual_ranks(virtual_ranks, group.size()), virtual_ranks};
      const auto subtrees = maximal_subtrees(layout.runs[group.rank()], virtual_ranks);
      auto slots = group.allocate(4 * kCount * sizeof(float), "slots");
      // Of whole numbers: any order gives these sums.
      const auto values = reinterpret_cast<float*>(slots.data());
      for (std::size_t slot = 0; slot < subtrees.size(); ++slot)
        for (std::size_t i = 0; i < kCount; ++i)
          values[slot * kCount + i] =
              static_cast<float>(subtrees[slot].size()) * static_cast<float>(i);
      const auto result = slots.first(kCount * sizeof(float));
      group.tree_all_reduce(slots, result, Dtype::float32, layout);
      bool right = true;
      for (std::size_t i = 0; i < kCount; ++i)
        right &= values[i] == static_cast<float>(virtual_ranks) * static_cast<float>(i);
      EXPECT_TRUE(right) << virtual_ranks << " virtual ranks, rank " << group.rank();
    }
  });
}

TEST(HierarchicalTest, WeightsFromAnyRank) {
  for_shapes([](Group& group) {
    for (const int root : {0, group.size() - 1}) {
      auto data = naive::inputs<float>(group.rank(), kCount);
      group.broadcast(data, Dtype::float32, root);
      EXPECT_TRUE(data == naive::inputs<float>(root, kCount)) << "from " << root;
    }
  });
}

// Runs body on 2 + 2 ranks; their errors.
std::vector<std::string> errors_of(const std::function<void(Group&, const NodeGroups&)>& body) {
  std::vector<std::string> errors(4);
  run_nodes({2, 2}, [&](const NodeGroups& groups) {
    auto group = make_hierarchical_group(groups, {.timeout = kTestTimeout});
    errors[group->rank()] = error_of([&] { body(*group, groups); });
  });
  return errors;
}

TEST(HierarchicalErrorTest, AllRanksQuoteAllCalls) {
  for (const std::string& error : errors_of([](Group&group, const NodeGroups&) {
         std::vector<std::byte> data(400'000);
         group.all_reduce(data, Dtype::float32, group.rank() == 2 ? Reduction::max : Reduction::sum,
                          {.tag = "gradients"});
       }))
    EXPECT_THAT(error,
                AllOf(HasSubstr("the ranks' calls differ: ranks 0 and 1 and 3 called all_reduce("
                                "float32 × 100000, sum, tag 'gradients')"),
                      HasSubstr("rank 2 called all_reduce(float32 × 100000, max")));
}

TEST(HierarchicalErrorTest, AFailureBetweenNodesEndsTheNodesGroups) {
  std::barrier<> all(4);
  const auto errors = errors_of([&](Group& group, const NodeGroups& groups) {
    if (group.rank() == 2) {  // node 1's leader gives up, without the others' knowledge
      EXPECT_THAT(error_of([&] { groups.carriers->barrier({.timeout = 1ms}); }),
                  HasSubstr("gave up after"));
    }
    all.arrive_and_wait();
    std::vector<std::byte> data(400'000);
    group.all_reduce(data, Dtype::float32, Reduction::sum);
  });
  for (const std::string& error : errors) EXPECT_THAT(error, HasSubstr("gave up after"));
}

TEST(HierarchicalTest, StatisticsAddUp) {
  run_nodes({2, 2}, [](const NodeGroups& groups) {
    auto group = make_hierarchical_group(groups, {.timeout = kTestTimeout});
    std::vector<std::byte> data(400'000);
    group->all_reduce(data, Dtype::float32, Reduction::sum);
    group->barrier();
    const GroupStatistics statistics = group->statistics();
    EXPECT_EQ(statistics.operations, 2u);
    EXPECT_EQ(statistics.bytes, 400'000u);
    EXPECT_GE(statistics.total, statistics.waiting);
    EXPECT_GE(statistics.moved, 400'000u);
  });
}

// As on nodes of one rank each: what is one group counts once.
TEST(HierarchicalTest, StatisticsCountNoGroupTwice) {
  for (const bool one_group : {false, true})
    run_nodes({1, 1}, [one_group](NodeGroups groups) {
      if (one_group) groups.everyone = groups.carriers;
      auto group = make_hierarchical_group(groups, {.timeout = kTestTimeout});
      std::vector<std::byte> data(400'000);
      group->all_reduce(data, Dtype::float32, Reduction::sum);
      const GroupStatistics statistics = group->statistics();
      EXPECT_EQ(statistics.moved,
                groups.carriers->statistics().moved + groups.local->statistics().moved);
      EXPECT_GE(statistics.total, statistics.waiting);
    });
}

}  // namespace
}  // namespace lockstep
