#include "lockstep/collective/wire_format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <barrier>
#include <cmath>

#include "lockstep/collective/backends_test.h"

namespace lockstep {
namespace {

using Values = std::vector<float>;
constexpr WireFormat kFormats[] = {WireFormat::bf16, WireFormat::int8};

Values values_of(std::uint64_t owner, std::size_t count) {
  Values values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = naive::input<float>(owner, i);
  return values;
}
std::span<std::byte> bytes_of(Values& values) { return std::as_writable_bytes(std::span(values)); }

std::shared_ptr<Group> borrowed(Group& group) { return {std::shared_ptr<void>(), &group}; }

// One process doing the same: whole arrays, no parts, no tiles.
class Simulation {
 public:
  Simulation(WireFormat format, std::size_t ranks, std::size_t count)
      : format_(format), errors_(ranks + 1, Values(count)) {}
  Values reduce(const std::vector<Values>& inputs, bool mean, std::size_t ranks_of_mean = 0) {
    std::vector<Values> arrived;
    for (std::size_t r = 0; r < inputs.size(); ++r) arrived.push_back(through(inputs[r], r));
    Values sums;
    const auto divisor = static_cast<float>(ranks_of_mean == 0 ? inputs.size() : ranks_of_mean);
    for (std::size_t i = 0; i < inputs[0].size(); ++i) {
      Values column;
      for (const Values& one : arrived) column.push_back(one[i]);
      const float sum = naive::tree(column, 0, static_cast<int>(column.size()), Reduction::sum,
                                    [](float x) { return x; });
      sums.push_back(mean ? sum / divisor : sum);
    }
    return through(sums, inputs.size());
  }

 private:
  Values through(const Values& values, std::size_t whose) {
    std::vector<std::byte> wire(wire_bytes(format_, values.size()));
    const WireKernels& set = all_wire_kernels()[0];
    set.encode(format_, wire.data(), values.data(), errors_[whose].data(), values.size());
    Values arrived(values.size());
    set.decode(format_, arrived.data(), wire.data(), values.size());
    return arrived;
  }
  WireFormat format_;
  std::vector<Values> errors_;  // by rank, then the owners'
};

// body(rank's compressed group, the group below it) as every rank.
void run_compressed(int size, WireFormat format,
                    const std::function<void(CompressedGroup&, Group&)>& body) {
  const auto segment = make_segment(size);
  std::barrier over(size);  // nobody leaves while another is still in a call
  run_threads(size, [&](int rank) {
    const std::shared_ptr<Group> group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    body(*make_compressed_group(group, format), *group);
    over.arrive_and_wait();
  });
}

void check_bits(WireFormat format, int size, std::size_t count) {
  std::vector<Values> inputs;
  for (int rank = 0; rank < size; ++rank)
    inputs.push_back(values_of(static_cast<std::uint64_t>(rank), count));
  Simulation sums(format, inputs.size(), count), means(format, inputs.size(), count);
  std::vector<Values> expected;
  for (int step = 0; step < 3; ++step) {
    expected.push_back(sums.reduce(inputs, false));
    expected.push_back(means.reduce(inputs, true));
  }
  for (const Backend& backend : backends()) {
    if (std::ranges::count(backend.sizes, size) == 0) continue;
    backend.run(size, [&](Group& below) {
      const auto group = make_compressed_group(borrowed(below), format);
      for (std::size_t call = 0; call < expected.size(); ++call) {
        const bool sum = call % 2 == 0;
        Values data = inputs[static_cast<std::size_t>(group->rank())];
        group->all_reduce(bytes_of(data), Dtype::float32, sum ? Reduction::sum : Reduction::mean,
                          {.tag = sum ? "a" : "b"});
        EXPECT_EQ(data, expected[call])
            << backend.name << ", " << name_of(format) << " × " << count << ", " << call;
      }
    });
  }
}

TEST(WireFormat, EveryRankHasTheBitsOfOneProcessOverAnyGroup) {
  for (const WireFormat format : kFormats)
    for (const int size : {2, 3, 5, 8})
      for (const std::size_t count : {1024, 5000, kThreadSanitizer ? 9001 : 70'001})
        check_bits(format, size, count);
}

// What the wire loses comes later: a sum over many calls is off by what is still kept.
TEST(WireFormat, OverManyCallsNothingIsLost) {
  constexpr std::size_t kCount = 3000;
  constexpr int kCalls = 200;
  for (const WireFormat format : kFormats)
    run_compressed(2, format, [&](CompressedGroup& group, Group& exact) {
      Values once = values_of(static_cast<std::uint64_t>(group.rank()), kCount);
      Values total(kCount), without(kCount);
      for (int call = 0; call < kCalls; ++call) {
        Values data = once, untagged = once;
        group.all_reduce(bytes_of(data), Dtype::float32, Reduction::sum, {.tag = "a"});
        group.all_reduce(bytes_of(untagged), Dtype::float32, Reduction::sum);
        for (std::size_t i = 0; i < kCount; ++i) total[i] += data[i], without[i] += untagged[i];
      }
      exact.all_reduce(bytes_of(once), Dtype::float32, Reduction::sum);
      double worst = 0, worst_without = 0;
      for (std::size_t i = 0; i < kCount; ++i) {
        worst = std::max<double>(worst, std::fabs(total[i] / kCalls - once[i]));
        worst_without = std::max<double>(worst_without, std::fabs(without[i] / kCalls - once[i]));
      }
      EXPECT_LT(worst, worst_without / 20) << name_of(format);
      EXPECT_EQ(group.errors().size(), 1u);
    });
}

TEST(WireFormat, TheRestPassesThrough) {
  for (const WireFormat format : {WireFormat::fp32, WireFormat::bf16, WireFormat::int8})
    run_compressed(3, format, [&](CompressedGroup& group, Group&) {
      const auto check = [&]<typename T>(Dtype dtype, Reduction reduction, std::size_t count, T) {
        auto data = naive::inputs<T>(static_cast<std::uint64_t>(group.rank()), count);
        group.all_reduce(data, dtype, reduction, {.tag = "a"});
        EXPECT_EQ(data, (naive::reduced<T>(3, count, reduction)));
      };
      check(Dtype::float32, Reduction::sum, kLeastCompressed - 1, float{});
      check(Dtype::float32, Reduction::max, 5000, float{});
      check(Dtype::float64, Reduction::mean, 5000, double{});
      check(Dtype::int32, Reduction::sum, 5000, std::int32_t{});
      if (format == WireFormat::fp32) check(Dtype::float32, Reduction::mean, 5000, float{});
      EXPECT_TRUE(group.errors().empty());
      EXPECT_THAT(error_of([&] {
                    std::vector<std::byte> odd(4099);
                    group.all_reduce(odd, Dtype::float32, Reduction::sum);
                  }),
                  testing::HasSubstr("no whole number of float32 elements"));
    });
}

TEST(WireFormat, FewerBytesTravel) {
  constexpr std::size_t kCount = 1 << 20;
  for (const auto& [format, share] :
       {std::pair(WireFormat::bf16, 0.5), std::pair(WireFormat::int8, 0.254)})
    run_compressed(2, format, [&](CompressedGroup& group, Group&) {
      const auto before = group.statistics().bytes;
      Values data(kCount, 1);
      group.all_reduce(bytes_of(data), Dtype::float32, Reduction::sum);
      // Two calls: all parts to their owners, one part to all.
      EXPECT_LE(static_cast<double>(group.statistics().bytes - before), share * 4 * kCount * 1.5);
    });
}

TEST(WireFormat, ErrorsSavedAndSetGoOnWithTheSameBits) {
  constexpr std::size_t kCount = 4321;
  const auto steps = [](CompressedGroup& group, int first, int last) {
    Values data;
    for (int step = first; step < last; ++step) {
      data = values_of(static_cast<std::uint64_t>(10 * step + group.rank()), kCount);
      group.all_reduce(bytes_of(data), Dtype::float32, Reduction::mean, {.tag = "gradients"});
    }
    return data;
  };
  const auto segment = make_segment(2);
  run_threads(2, [&](int rank) {
    const std::shared_ptr<Group> group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    const auto whole = make_compressed_group(group, WireFormat::int8);
    const auto first = make_compressed_group(group, WireFormat::int8);
    const auto second = make_compressed_group(group, WireFormat::int8);
    const Values expected = steps(*whole, 0, 6);
    steps(*first, 0, 3);
    second->errors() = first->errors();
    EXPECT_EQ(steps(*second, 3, 6), expected);
    EXPECT_EQ(second->errors(), whole->errors());
    second->errors()["gradients"].pop_back();  // not this tensor's: forgotten
    EXPECT_EQ(steps(*second, 0, 6), expected);
  });
}

// Two nodes with two ranks each: what travels between them are the nodes' sums.
TEST(WireFormat, NodesSumsTravel) {
  constexpr std::size_t kCount = 5001, kPart = 2501;
  std::vector<Values> nodes;
  for (const int node : {0, 1}) {
    Values sum = values_of(2 * node, kCount), other = values_of(2 * node + 1, kCount);
    for (std::size_t i = 0; i < kCount; ++i) sum[i] += other[i];
    nodes.push_back(sum);
  }
  Values expected;
  for (const std::size_t first : {std::size_t{0}, kPart}) {  // each local rank's
    std::vector<Values> parts;
    for (const Values& node : nodes) {
      parts.emplace_back(kPart);
      std::copy(node.begin() + first, node.begin() + std::min(kCount, first + kPart),
                parts.back().begin());
    }
    const Values part = Simulation(WireFormat::int8, 2, kPart).reduce(parts, true, 4);
    expected.insert(expected.end(), part.begin(), part.end());
  }
  expected.resize(kCount);
  run_nodes({2, 2}, [&](const NodeGroups& groups) {
    const std::shared_ptr<Group> group = make_hierarchical_group(groups, {.timeout = kTestTimeout});
    const auto compressed = make_compressed_group(group, WireFormat::int8, groups);
    Values data = values_of(static_cast<std::uint64_t>(group->rank()), kCount);
    compressed->all_reduce(bytes_of(data), Dtype::float32, Reduction::mean, {.tag = "a"});
    EXPECT_EQ(data, expected);
  });
}

TEST(WireFormat, RanksThatDisagreeAreTold) {
  run_compressed(2, WireFormat::int8, [](CompressedGroup& group, Group&) {
    Values data(group.rank() == 0 ? 4000 : 5000);
    EXPECT_THAT(error_of([&] {
                  group.all_reduce(bytes_of(data), Dtype::float32, Reduction::sum,
                                   {.tag = "gradients"});
                }),
                testing::AllOf(testing::HasSubstr("rank 0"), testing::HasSubstr("rank 1"),
                               testing::HasSubstr("tag 'gradients'")));
  });
}

}  // namespace
}  // namespace lockstep
