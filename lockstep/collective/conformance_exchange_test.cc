// What every group must do, continued: operations whose result not every rank has or that only
// copy, messages, sub-groups.
#include <gmock/gmock.h>

#include <numeric>

#include "lockstep/collective/backends_test.h"
#include "lockstep/collective/mesh.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using Counts = std::vector<std::uint64_t>;
constexpr std::size_t kCounts[] = {0, 1, 1037};

// Elements [from, from + count) of what naive::inputs gives an owner.
template <typename T>
std::vector<std::byte> part(std::uint64_t owner, std::size_t from, std::size_t count) {
  const auto all = naive::inputs<T>(owner, from + count);
  return {all.begin() + from * sizeof(T), all.end()};
}

void append(std::vector<std::byte>& to, const std::vector<std::byte>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

template <typename T>
void check_reduce(Group& group, Dtype dtype, std::size_t count, Reduction reduction, int root,
                  Memory memory) {
  const auto mine = naive::inputs<T>(group.rank(), count);
  Buffer data(group, memory, count * sizeof(T));
  data.set(mine);
  group.reduce(data.bytes(), dtype, reduction, root);
  const bool is_root = group.rank() == root;
  EXPECT_TRUE(data.get() == (is_root ? naive::reduced<T>(group.size(), count, reduction) : mine))
      << name_of(reduction) << " of " << count << " to " << root;
}

template <typename T>
void check_reduce_scatter(Group& group, Dtype dtype, std::size_t count, Reduction reduction,
                          Memory memory) {
  const std::size_t bytes = count * sizeof(T);
  Buffer input(group, memory, group.size() * bytes);
  Buffer output(group, memory, bytes);
  input.set(naive::inputs<T>(group.rank(), group.size() * count));
  const auto all = naive::reduced<T>(group.size(), group.size() * count, reduction);
  group.reduce_scatter(input.bytes(), output.bytes(), dtype, reduction);
  EXPECT_TRUE(
      std::ranges::equal(output.bytes(), std::span(all).subspan(group.rank() * bytes, bytes)))
      << name_of(reduction) << " of " << count;
}

template <typename T>
void check_gather_and_scatter(Group& group, Dtype dtype, std::size_t count, int root, Memory memory,
                              bool in_place) {
  const std::size_t bytes = count * sizeof(T);
  const bool is_root = group.rank() == root;
  Buffer whole(group, memory, group.size() * bytes);  // on all ranks: allocate() is symmetric
  Buffer piece(group, memory, bytes);
  const auto own =
      in_place && is_root ? whole.bytes().subspan(group.rank() * bytes, bytes) : piece.bytes();
  std::ranges::copy(naive::inputs<T>(group.rank(), count), own.begin());
  const auto at_root = is_root ? whole.bytes() : std::span<std::byte>();
  group.gather(own, at_root, dtype, root);
  std::vector<std::byte> expected;
  for (int rank = 0; rank < group.size(); ++rank) append(expected, naive::inputs<T>(rank, count));
  if (is_root) {
    EXPECT_TRUE(whole.get() == expected) << count << " to " << root;
  }
  if (!own.empty() && !(in_place && is_root)) std::memset(own.data(), 0, own.size());
  group.scatter(at_root, own, dtype, root);
  EXPECT_TRUE(std::ranges::equal(own, naive::inputs<T>(group.rank(), count)))
      << count << " from " << root;
}

// Rank r has elements [0, n) for everybody, one after another; how many, from_to(source, target)
// says.
template <typename T, typename FromTo>
void check_all_to_all(Group& group, Dtype dtype, Memory memory, bool even, FromTo&& from_to) {
  Counts inputs, outputs;
  std::vector<std::byte> expected;
  for (int other = 0; other < group.size(); ++other) {
    inputs.push_back(from_to(group.rank(), other));
    outputs.push_back(from_to(other, group.rank()));
    std::size_t before = 0;
    for (int rank = 0; rank < group.rank(); ++rank) before += from_to(other, rank);
    append(expected, part<T>(other, before, outputs.back()));
  }
  const auto sum = [](const Counts& counts) {
    return std::accumulate(counts.begin(), counts.end(), std::size_t{0});
  };
  Buffer input(group, memory, sum(inputs) * sizeof(T));
  Buffer output(group, memory, sum(outputs) * sizeof(T));
  input.set(naive::inputs<T>(group.rank(), sum(inputs)));
  if (even)
    group.all_to_all(input.bytes(), output.bytes(), dtype);
  else
    group.all_to_all_uneven(input.bytes(), inputs, output.bytes(), outputs, dtype);
  EXPECT_TRUE(output.get() == expected) << "even " << even;
}

template <typename T>
void check_all_gather_uneven(Group& group, Dtype dtype, std::size_t count, Memory memory,
                             bool in_place) {
  Counts counts;
  std::vector<std::byte> expected;
  std::size_t before = 0;
  for (int rank = 0; rank < group.size(); ++rank) {
    counts.push_back(rank % 3 == 1 ? 0 : count + rank);
    if (rank < group.rank()) before += counts.back() * sizeof(T);
    append(expected, naive::inputs<T>(rank, counts.back()));
  }
  const std::size_t own = counts[group.rank()] * sizeof(T);
  Buffer input(group, memory, own);
  Buffer output(group, memory, expected.size());
  const auto from = in_place ? output.bytes().subspan(before, own) : input.bytes();
  std::ranges::copy(naive::inputs<T>(group.rank(), counts[group.rank()]), from.begin());
  group.all_gather_uneven(from, output.bytes(), counts, dtype);
  EXPECT_TRUE(output.get() == expected) << count;
}

// Everybody sends to the next, even ranks first.
template <typename T>
void check_ring_of_messages(Group& group, Dtype dtype, std::size_t count, Memory memory) {
  const int next = (group.rank() + 1) % group.size();
  const int last = (group.rank() + group.size() - 1) % group.size();
  Buffer mine(group, memory, count * sizeof(T));
  Buffer theirs(group, memory, count * sizeof(T));
  mine.set(naive::inputs<T>(group.rank(), count));
  const auto send = [&] { group.send(mine.bytes(), dtype, next, {.tag = "activations"}); };
  if (group.rank() % 2 == 0) send();
  group.recv(theirs.bytes(), dtype, last);
  if (group.rank() % 2 != 0) send();
  EXPECT_TRUE(theirs.get() == naive::inputs<T>(last, count)) << count;
}

void check_all_reduce_in(Group& group, Memory memory) {
  Buffer data(group, memory, 1037 * sizeof(float));
  data.set(naive::inputs<float>(group.rank(), 1037));
  group.all_reduce(data.bytes(), Dtype::float32, Reduction::sum);
  EXPECT_TRUE(data.get() == naive::reduced<float>(group.size(), 1037, Reduction::sum));
}

class ExchangeTest : public ConformanceTest {};

TEST_P(ExchangeTest, ReduceAndReduceScatter) {
  for_all([]<typename T>(Group& group, Dtype dtype, T) {
    for (const std::size_t count : kCounts)
      for (const Reduction reduction : kReductions) {
        const Memory memory = kMemories[(count + static_cast<std::size_t>(reduction)) % 3];
        check_reduce<T>(group, dtype, count, reduction, group.size() - 1, memory);
        check_reduce_scatter<T>(group, dtype, count, reduction, memory);
      }
  });
}

TEST_P(ExchangeTest, GatherAndScatter) {
  for_all([]<typename T>(Group& group, Dtype dtype, T) {
    for (const std::size_t count : kCounts)
      for (const Memory memory : kMemories)
        for (int root = 0; root < group.size(); root += 3)
          check_gather_and_scatter<T>(group, dtype, count, root, memory, root % 2 == 0);
  });
}

TEST_P(ExchangeTest, AllToAllAndUnevenAllGather) {
  for_all([]<typename T>(Group& group, Dtype dtype, T) {
    for (const std::size_t count : kCounts)
      for (const Memory memory : kMemories) {
        check_all_to_all<T>(group, dtype, memory, true, [&](int, int) { return count; });
        check_all_to_all<T>(group, dtype, memory, false, [&](int from, int to) {
          return (from + to) % 3 == 0 ? 0 : count / (1 + to) + from;
        });
        check_all_gather_uneven<T>(group, dtype, count, memory, false);
        check_all_gather_uneven<T>(group, dtype, count, memory, true);
      }
  });
}

TEST_P(ExchangeTest, Messages) {
  for_all([]<typename T>(Group& group, Dtype dtype, T) {
    if (group.size() == 1) return;
    for (const std::size_t count : kCounts)
      for (const Memory memory : kMemories) check_ring_of_messages<T>(group, dtype, count, memory);
  });
}

TEST_P(ExchangeTest, SeveralChunks) {
  for (const int size : kLargeSizes) {
    if (size == 1 || std::ranges::count(GetParam().sizes, size) == 0) continue;
    GetParam().run(size, [](Group& group) {
      constexpr std::size_t kCount = kLargeBytes / 4;
      for (const Memory memory : {Memory::ordinary, Memory::mixed}) {
        check_reduce<float>(group, Dtype::float32, kCount, Reduction::mean, 1, memory);
        check_reduce_scatter<float>(group, Dtype::float32, kCount / 2, Reduction::sum, memory);
        check_gather_and_scatter<float>(group, Dtype::float32, kCount / 2, 1, memory, false);
        check_all_to_all<float>(group, Dtype::float32, memory, false,
                                [&](int from, int to) { return kCount / (1 + from + 2 * to); });
        check_ring_of_messages<float>(group, Dtype::float32, kCount, memory);
      }
    });
  }
}

// Only the two take part: the others are elsewhere.
TEST_P(ExchangeTest, AMessageNeedsNobodyElse) {
  if (GetParam().sizes.back() < 3) return;
  GetParam().run(3, [](Group& group) {
    std::int32_t value = 0;
    const std::span bytes = std::as_writable_bytes(std::span(&value, 1));
    for (std::int32_t i = 0; i < 200; ++i) {
      if (group.rank() == 0) {
        value = i;
        group.send(bytes, Dtype::int32, 1);
        group.recv(bytes, Dtype::int32, 1);
        EXPECT_EQ(value, i + 1);
      } else if (group.rank() == 1) {
        group.recv(bytes, Dtype::int32, 0);
        EXPECT_EQ(value, i);
        ++value;
        group.send(bytes, Dtype::int32, 0);
      }
    }
    group.barrier();
  });
}

TEST_P(ExchangeTest, SubGroups) {
  for (const int size : GetParam().sizes)
    GetParam().run(size, [size](Group& group) {
      // Odd and even ranks, counted from behind; rank 0 stays out when there are others.
      const int color = size > 1 && group.rank() == 0 ? -1 : group.rank() % 2;
      auto half = group.split(color, -group.rank());
      EXPECT_EQ(half == nullptr, color < 0);
      if (half != nullptr) {
        std::vector<std::int64_t> ranks(half->size());
        const std::int64_t own = group.rank();
        half->all_gather(std::as_bytes(std::span(&own, 1)),
                         std::as_writable_bytes(std::span(ranks)), Dtype::int64);
        EXPECT_EQ(ranks[half->rank()], own);
        EXPECT_TRUE(std::ranges::is_sorted(ranks, std::greater()));
        for (const std::int64_t rank : ranks) EXPECT_EQ(rank % 2, color);
        for (const Memory memory : {Memory::arena, Memory::ordinary})
          check_all_reduce_in(*half, memory);
        auto alone = half->split(half->rank(), 0);
        EXPECT_EQ(alone->size(), 1);
        check_all_reduce_in(*alone, Memory::ordinary);
      }
      check_all_reduce_in(group, Memory::arena);
    });
}

TEST_P(ExchangeTest, Meshes) {
  const int size = GetParam().sizes.back();
  GetParam().run(size, [size](Group& group) {
    const int columns = size % 2 == 0 ? 2 : 1;
    auto mesh = init_device_mesh(group, {size / columns, columns}, {"data", "tensor"});
    EXPECT_EQ(mesh.axis("data").rank(), group.rank() / columns);
    EXPECT_EQ(mesh.axis("tensor").rank(), group.rank() % columns);
    EXPECT_EQ(mesh.coordinate("tensor"), group.rank() % columns);
    std::vector<std::int32_t> sum = {group.rank()};
    for (const char* name : {"tensor", "data"})
      mesh.axis(name).all_reduce(std::as_writable_bytes(std::span(sum)), Dtype::int32,
                                 Reduction::sum);
    EXPECT_EQ(sum[0], size * (size - 1) / 2);
    EXPECT_THAT(error_of([&] { mesh.axis("pipeline"); }),
                HasSubstr("no axis 'pipeline'; hint: data, tensor"));
    EXPECT_THAT(error_of([&] { init_device_mesh(group, {size + 1}, {"data"}); }),
                HasSubstr("has room for"));
    EXPECT_THAT(error_of([&] {
                  init_device_mesh(group, {size, 1}, {"data", "data"});
                }),
                HasSubstr("twice"));
    EXPECT_THAT(error_of([&] { init_device_mesh(group, {size}, {}); }), HasSubstr("names"));
  });
}

TEST_P(ExchangeTest, WrongArgumentsAreRefused) {
  GetParam().run(GetParam().sizes.back(), [](Group& group) {
    const int size = group.size();
    std::vector<std::byte> memory(32 * size);
    const std::span<std::byte> all(memory);
    const auto first = all.first(16 * size), second = all.last(16 * size);
    const Counts fair(size, 16), short_of(size, 15), too_many(size + 1, 16);
    using enum Dtype;
    const std::vector<std::pair<std::string, std::function<void()>>> wrong = {
        {"reduce: root 8", [&] { group.reduce(first, int8, Reduction::sum, 8); }},
        {"reduce_scatter: the whole has",
         [&] { group.reduce_scatter(first, second.first(15), int8, Reduction::sum); }},
        {"reduce_scatter: input and output overlap",
         [&] { group.reduce_scatter(first, first.first(16), int8, Reduction::sum); }},
        {"gather: root -1", [&] { group.gather(first, all, int8, -1); }},
        {"scatter: root -1", [&] { group.scatter(first, all, int8, -1); }},
        {"equal parts", [&] { group.all_to_all(first, all, int8); }},
        {"all_to_all: input and output overlap", [&] { group.all_to_all(first, first, int8); }},
        {"counts name", [&] { group.all_to_all_uneven(first, short_of, second, fair, int8); }},
        {"counts for", [&] { group.all_to_all_uneven(first, fair, second, too_many, int8); }},
        {"exceed", [&] { group.all_gather_uneven(first, second.first(1), fair, int8); }},
        {"send: rank " + std::to_string(group.rank()) + " names rank",
         [&] { group.send(first, int8, group.rank()); }},
        {"recv: rank " + std::to_string(group.rank()) + " names rank 9",
         [&] { group.recv(first, int8, 9); }},
        {"send: 3 bytes are no whole", [&] { group.send(first.first(3), int32, 0); }},
    };
    for (const auto& [text, call] : wrong) EXPECT_THAT(error_of(call), HasSubstr(text));
    group.barrier();
  });
}

INSTANTIATE_TEST_SUITE_P(All, ExchangeTest, ::testing::ValuesIn(backends()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lockstep
