#include "lockstep/tools/collective_bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(CollectiveBenchTest, Sizes) {
  EXPECT_EQ(parse_size("4"), 4u);
  EXPECT_EQ(parse_size("16K"), 16384u);
  EXPECT_EQ(parse_size("1M"), 1u << 20);
  EXPECT_EQ(parse_size("3G"), 3ull << 30);
  EXPECT_EQ(parse_size("26214400"), 26214400u);
  for (const char* wrong :
       {"", "K", "0", "-4", "4k", "4KB", "1.5M", " 4", "99999999999999999999", "9999999999G"})
    EXPECT_THAT([&] { parse_size(wrong); },
                ThrowsMessage<ConfigError>(HasSubstr("is no size in bytes; hint: ")))
        << wrong;
}

TEST(CollectiveBenchTest, BusBandwidthIsWhatNcclTestsDefine) {
  const auto factor = [](const char* name, int ranks) {
    return bench_operation(name).bus_factor(ranks);
  };
  EXPECT_DOUBLE_EQ(factor("all_reduce", 2), 1);
  EXPECT_DOUBLE_EQ(factor("all_reduce", 4), 1.5);
  EXPECT_DOUBLE_EQ(factor("all_reduce", 1), 0);
  EXPECT_DOUBLE_EQ(factor("all_gather", 4), 0.75);
  for (const char* name : {"reduce_scatter", "all_to_all", "gather", "scatter"})
    EXPECT_DOUBLE_EQ(factor(name, 4), 0.75);
  for (const char* name : {"broadcast", "reduce", "send_recv"})
    EXPECT_DOUBLE_EQ(factor(name, 4), 1);
}

TEST(CollectiveBenchTest, UnknownOperationNamesTheNearest) {
  EXPECT_THAT([] { bench_operation("allreduce"); },
              ThrowsMessage<ConfigError>(HasSubstr("did you mean all_reduce?")));
}

TEST(CollectiveBenchTest, SizesAreRoundedDownToWholeElements) {
  const auto count = [](const char* name, std::uint64_t size, int ranks) {
    return bench_case(bench_operation(name), Dtype::float32, Reduction::sum, ranks, size).count;
  };
  EXPECT_EQ(count("all_reduce", 31, 3), 7u);
  EXPECT_EQ(count("all_gather", 31, 3), 6u);
  EXPECT_EQ(count("barrier", 31, 3), 0u);
  EXPECT_THROW(count("all_reduce", 3, 1), ConfigError);
  EXPECT_THROW(count("all_gather", 4, 2), ConfigError);
}

TEST(CollectiveBenchTest, EveryOperationOfEveryDtypeGivesWhatIsExpectedAlone) {
  const auto group = make_solo_group();
  for (int i = 0; i < kDtypeCount; ++i)
    for (const BenchOperation& operation : bench_operations()) {
      const auto c =
          bench_case(operation, static_cast<Dtype>(i), Reduction::mean, /*ranks=*/1, 104);
      std::vector<std::byte> input(bytes_of(operation.input, c)),
          output(bytes_of(operation.output, c));
      fill(operation.input == Extent::none ? output : input, c.dtype, 0);
      operation.call(*group, c, input, output);
      if (output.empty() || std::isnan(operation.expected(c, 0))) continue;
      EXPECT_NO_THROW(check(operation, c, output)) << operation.name;
      output.back() ^= std::byte{0x40};
      EXPECT_THAT([&] { check(operation, c, output); },
                  ThrowsMessage<Error>(HasSubstr("gave a wrong result: element")))
          << operation.name;
    }
}

TEST(CollectiveBenchTest, ExpectedValuesOfSeveralRanks) {
  BenchCase c{.dtype = Dtype::float32, .reduction = Reduction::sum, .ranks = 3, .count = 6};
  const BenchOperation& all_reduce = bench_operation("all_reduce");
  EXPECT_EQ(all_reduce.expected(c, 0), 1 + 2 + 1);
  EXPECT_EQ(all_reduce.expected(c, 1), 2 + 1 + 2);
  c.reduction = Reduction::product;
  EXPECT_EQ(all_reduce.expected(c, 1), 4);
  c.reduction = Reduction::min;
  EXPECT_EQ(all_reduce.expected(c, 0), 1);
  c.reduction = Reduction::mean;
  EXPECT_DOUBLE_EQ(all_reduce.expected(c, 0), 4.0 / 3);
  c.dtype = Dtype::int32;
  EXPECT_EQ(all_reduce.expected(c, 0), 1);
  c.rank = 2;
  for (std::uint64_t i = 0; i < 2; ++i) {
    EXPECT_EQ(bench_operation("all_gather").expected(c, 2 + i), bench_value(1, i));
    EXPECT_EQ(bench_operation("reduce_scatter").expected(c, i), all_reduce.expected(c, 4 + i));
    EXPECT_EQ(bench_operation("scatter").expected(c, i), bench_value(0, 4 + i));
    EXPECT_EQ(bench_operation("all_to_all").expected(c, 2 + i), bench_value(1, 4 + i));
    EXPECT_EQ(bench_operation("send_recv").expected(c, i), bench_value(1, i));
  }
}

TEST(CollectiveBenchTest, SmallCallsAreTimedInBatches) {
  EXPECT_EQ(calls_in_batch(0), 500u);
  EXPECT_EQ(calls_in_batch(4), 500u);
  EXPECT_EQ(calls_in_batch(16384), 256u);
  EXPECT_EQ(calls_in_batch(26214400), 1u);
}

TEST(CollectiveBenchTest, Summary) {
  const Times one = summarize({3});
  EXPECT_EQ(one.median, 3);
  EXPECT_EQ(one.p90, 3);
  const Times ten = summarize({10, 9, 8, 7, 6, 5, 4, 3, 2, 1});
  EXPECT_EQ(ten.median, 5.5);
  EXPECT_EQ(ten.min, 1);
  EXPECT_EQ(ten.p90, 9);
  EXPECT_EQ(ten.max, 10);
}

TEST(CollectiveBenchTest, Lines) {
  const BenchResult result{.operation = "all_reduce",
                           .ranks = 4,
                           .bytes = 4000,
                           .count = 1000,
                           .dtype = Dtype::float32,
                           .arena = true,
                           .us = {.median = 2, .min = 1, .p90 = 3, .max = 4},
                           .bus_factor = 1.5,
                           .iterations = 70,
                           .moved_bytes = 32000};
  const auto json = nlohmann::json::parse(json_line(result));
  EXPECT_EQ(json, nlohmann::json({{"operation", "all_reduce"},
                                  {"ranks", 4},
                                  {"bytes", 4000},
                                  {"dtype", "float32"},
                                  {"arena", true},
                                  {"time_us", 2.0},
                                  {"min_us", 1.0},
                                  {"p90_us", 3.0},
                                  {"max_us", 4.0},
                                  {"algbw_gbps", 2.0},
                                  {"busbw_gbps", 3.0},
                                  {"iterations", 70},
                                  {"moved_bytes", 32000.0}}));
  const std::string row = table_row(result);
  EXPECT_EQ(row.size(), table_heading().size());
  EXPECT_THAT(
      row, HasSubstr(" float32     arena       2.000       1.000       3.000     2.00     3.00"));
  const std::string barrier = table_row({.operation = "barrier", .us = {.median = 0.5}});
  EXPECT_EQ(barrier.size(), table_heading().size());
}

}  // namespace
}  // namespace lockstep
