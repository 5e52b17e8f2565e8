// What every group must do, run against every backend: all operations, dtypes and sizes, with 1 to
// 8 ranks, in and outside the arena, compared with naive_test.h bit for bit. Here reductions,
// broadcast and all_gather; conformance_exchange_test.cc has the rest.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "lockstep/collective/backends_test.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
template <typename T>
void check_all_reduce(Group& group, Dtype dtype, std::size_t count, Reduction reduction,
                      const Memories& memories) {
  const auto mine = naive::inputs<T>(group.rank(), count);
  const auto expected = naive::reduced<T>(group.size(), count, reduction);
  for (const Memory memory : memories) {
    Buffer data(group, memory, count * sizeof(T));
    data.set(mine);
    group.all_reduce(data.bytes(), dtype, reduction, {.tag = "data"});
    EXPECT_TRUE(data.get() == expected) << name_of(reduction) << " of " << count;
  }
}

template <typename T>
void check_broadcast(Group& group, Dtype dtype, std::size_t count, int root,
                     const Memories& memories) {
  const auto mine = naive::inputs<T>(group.rank(), count);
  const auto expected = naive::inputs<T>(root, count);
  for (const Memory memory : memories) {
    Buffer data(group, memory, count * sizeof(T));
    data.set(mine);
    group.broadcast(data.bytes(), dtype, root);
    EXPECT_TRUE(data.get() == expected) << count << " from " << root;
  }
}

template <typename T>
void check_all_gather(Group& group, Dtype dtype, std::size_t count, const Memories& memories) {
  std::vector<std::byte> expected;
  for (int rank = 0; rank < group.size(); ++rank) {
    const auto theirs = naive::inputs<T>(rank, count);
    expected.insert(expected.end(), theirs.begin(), theirs.end());
  }
  const std::size_t bytes = count * sizeof(T);
  for (const Memory memory : memories) {
    for (const bool in_place : {false, true}) {
      Buffer input(group, memory, bytes);
      Buffer output(group, memory, group.size() * bytes);
      const auto part = output.bytes().subspan(group.rank() * bytes, bytes);
      const auto from = in_place ? part : input.bytes();
      std::copy_n(expected.begin() + group.rank() * bytes, bytes, from.begin());
      group.all_gather(from, output.bytes(), dtype);
      EXPECT_TRUE(output.get() == expected) << count;
    }
  }
}

TEST_P(ConformanceTest, AllReduce) {
  for_all([]<typename T>(Group& group, Dtype dtype, T) {
    for (const std::size_t count : kSizes)
      for (const Reduction reduction : kReductions)
        check_all_reduce<T>(group, dtype, count, reduction, kMemories);
  });
}

TEST_P(ConformanceTest, Broadcast) {
  for_all([]<typename T>(Group& group, Dtype dtype, T) {
    for (const std::size_t count : kSizes)
      for (int root = 0; root < group.size(); ++root)
        check_broadcast<T>(group, dtype, count, root, kMemories);
  });
}

TEST_P(ConformanceTest, AllGather) {
  for_all([]<typename T>(Group& group, Dtype dtype, T) {
    for (const std::size_t count : kSizes) check_all_gather<T>(group, dtype, count, kMemories);
  });
}

TEST_P(ConformanceTest, SeveralChunks) {
  for (const int size : kLargeSizes) {
    if (std::ranges::count(GetParam().sizes, size) == 0) continue;
    GetParam().run(size, [](Group& group) {
      const Memories memories = {Memory::ordinary, Memory::mixed};
      check_all_reduce<float>(group, Dtype::float32, kLargeBytes / 4, Reduction::sum, memories);
      check_broadcast<double>(group, Dtype::float64, kLargeBytes / 8, group.size() - 1, memories);
      check_all_gather<double>(group, Dtype::float64, kLargeBytes / 8, memories);
    });
  }
}

// Each worker adds up its own virtual ranks as the plan says, rounding to the dtype each time.
template <typename T>
void check_tree(Group& group, Dtype dtype, int virtual_ranks, std::size_t count,
                bool result_apart) {
  TreeLayout layout{partition_virtual_ranks(virtual_ranks, group.size()), virtual_ranks};
  const VirtualRange run = layout.runs[group.rank()];
  const AccumulatePlan plan = plan_accumulation(run, virtual_ranks);
  auto slots = group.allocate(plan.slots * count * sizeof(T), "slots");
  auto result =
      result_apart ? group.allocate(count * sizeof(T), "result") : slots.first(count * sizeof(T));
  const auto element = [&](int slot, std::size_t i) {
    return slots.data() + (slot * count + i) * sizeof(T);
  };
  int top = 0;
  for (const AccumulateStep& step : plan.steps) {
    const auto contribution = naive::inputs<T>(step.virtual_rank, count);
    std::copy(contribution.begin(), contribution.end(), element(step.slot, 0));
    top = step.slot;
    for (int merge = 0; merge < step.merges; ++merge, --top)
      for (std::size_t i = 0; i < count; ++i) {
        T a, b;
        std::memcpy(&a, element(top - 1, i), sizeof(T));
        std::memcpy(&b, element(top, i), sizeof(T));
        const T sum = naive::narrow<T>(naive::widen(a) + naive::widen(b));
        std::memcpy(element(top - 1, i), &sum, sizeof(T));
      }
  }
  group.tree_all_reduce(slots, result, dtype, layout, {.tag = "gradients"});
  const auto expected = naive::reduced<T>(virtual_ranks, count, Reduction::sum, false);
  EXPECT_TRUE(std::equal(result.begin(), result.end(), expected.begin(), expected.end()))
      << virtual_ranks << " virtual ranks, " << count << " elements";
}

TEST_P(ConformanceTest, TreeAllReduceGivesTheSameBitsForEveryNumberOfWorkers) {
  for_all([]<typename T>(Group& group, Dtype dtype, T) {
    if constexpr (!std::is_integral_v<T>) {
      for (int virtual_ranks = group.size(); virtual_ranks <= 9; ++virtual_ranks)
        for (const std::size_t count : kSizes)
          check_tree<T>(group, dtype, virtual_ranks, count, count % 2 == 0 || virtual_ranks == 7);
    }
  });
}

TEST_P(ConformanceTest, ManyMixedOperationsInARow) {
  const int size = GetParam().sizes.size() > 1 ? 3 : 1;
  GetParam().run(size, [](Group& group) {
    for (std::uint64_t i = 0; i < 1000; ++i) {
      const std::uint64_t random = mix({i, 5});
      const std::size_t count = (random >> 8) % 300;
      const Memories memory = {
          kMemories[(random >> 20) % 2]};  // allocate() makes no calls of its own
      switch (random % 4) {
        case 0:
          group.barrier({.tag = "in between"});
          break;
        case 1:
          check_all_reduce<float>(group, Dtype::float32, count, kReductions[(random >> 4) % 5],
                                  memory);
          break;
        case 2:
          check_broadcast<std::int64_t>(group, Dtype::int64, count,
                                        static_cast<int>((random >> 4) % group.size()), memory);
          break;
        default:
          check_all_gather<std::int8_t>(group, Dtype::int8, count, memory);
      }
    }
    EXPECT_EQ(group.generation(), 0u);
  });
}

TEST_P(ConformanceTest, AllocatedMemoryIsAlignedAndZeroed) {
  GetParam().run(GetParam().sizes.back(), [](Group& group) {
    for (const std::size_t bytes : {0, 1, 100, 70'000}) {
      auto memory = group.allocate(bytes, "memory");
      ASSERT_EQ(memory.size(), bytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % 64, 0u);
      EXPECT_TRUE(std::ranges::all_of(memory, [](std::byte byte) { return byte == std::byte{0}; }));
      std::ranges::fill(memory, std::byte{1});
    }
  });
}

TEST_P(ConformanceTest, StatisticsCountOperationsAndBytes) {
  GetParam().run(GetParam().sizes.back(), [](Group& group) {
    const GroupStatistics before = group.statistics();
    std::vector<std::byte> data(12);
    group.all_reduce(data, Dtype::float32, Reduction::sum);
    group.barrier();
    const GroupStatistics after = group.statistics();
    EXPECT_EQ(after.operations, before.operations + 2);
    EXPECT_EQ(after.bytes, before.bytes + 12);
    EXPECT_GE(after.total, after.waiting);
  });
}

// Refused before anything is announced: the group lives on.
TEST_P(ConformanceTest, WrongArgumentsAreRefused) {
  GetParam().run(GetParam().sizes.back(), [](Group& group) {
    std::vector<std::byte> data(16 * group.size());
    const std::span<std::byte> all(data);
    auto arena = group.allocate(1024, "memory");
    const TreeLayout tree{partition_virtual_ranks(8, group.size()), 8};
    TreeLayout gap = tree;
    gap.runs[0].lo = 1;
    const std::vector<std::pair<std::string, std::function<void()>>> wrong = {
        {"all_reduce: 7 bytes are no whole number of float32 elements",
         [&] { group.all_reduce(all.first(7), Dtype::float32, Reduction::sum); }},
        {"root 8 in a group", [&] { group.broadcast(all, Dtype::int8, 8); }},
        {"root -1 in a group", [&] { group.broadcast(all, Dtype::int8, -1); }},
        {"all_gather: the whole has", [&] { group.all_gather(all.first(15), all, Dtype::int8); }},
        {"overlap in another place",
         [&] {
           auto output = arena.first(16 * group.size());
           group.all_gather(arena.subspan(16 * group.rank() + 1, 16), output, Dtype::int8);
         }},
        {"int32 is not floating point",
         [&] { group.tree_all_reduce(arena, arena.first(8), Dtype::int32, tree); }},
        {"do not fit in slots",
         [&] { group.tree_all_reduce(arena.first(4), arena.first(8), Dtype::float32, tree); }},
        {"should begin at virtual rank 0",
         [&] { group.tree_all_reduce(arena, arena.first(8), Dtype::float32, gap); }},
        {"of 9 virtual ranks",
         [&] {
           group.tree_all_reduce(arena, arena.first(8), Dtype::float32, {tree.runs, 9});
         }},
        {"runs for",
         [&] {
           group.tree_all_reduce(arena, arena.first(8), Dtype::float32, {{}, 8});
         }},
        {"not at their beginning",
         [&] { group.tree_all_reduce(arena, arena.subspan(4, 8), Dtype::float32, tree); }},
    };
    for (const auto& [text, call] : wrong) EXPECT_THAT(error_of(call), HasSubstr(text));
    group.barrier();
  });
}

INSTANTIATE_TEST_SUITE_P(All, ConformanceTest, ::testing::ValuesIn(backends()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lockstep
