#include "lockstep/parallel/data_loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

// What all ranks take, step by step and rank by rank.
struct Taken {
  std::vector<std::size_t> samples;
  std::uint64_t smallest = ~std::uint64_t{0};
  std::uint64_t largest = 0;
  std::uint64_t steps = 0;
};

Taken take_all(std::uint64_t samples, int ranks, const DataLoaderOptions& options,
               std::uint64_t epoch = 0) {
  Taken taken;
  std::vector<SampleOrder> orders;
  for (int rank = 0; rank < ranks; ++rank) orders.emplace_back(samples, rank, ranks, options);
  taken.steps = orders.front().steps();
  for (std::uint64_t step = 0; step < taken.steps; ++step) {
    for (const SampleOrder& order : orders) {
      EXPECT_EQ(order.steps(), taken.steps);
      const std::vector<std::size_t> indices = order.indices(order.epoch(epoch), step);
      taken.smallest = std::min<std::uint64_t>(taken.smallest, indices.size());
      taken.largest = std::max<std::uint64_t>(taken.largest, indices.size());
      taken.samples.insert(taken.samples.end(), indices.begin(), indices.end());
    }
  }
  return taken;
}

TEST(SampleOrder, EverySampleOnceAndNoBatchEmpty) {
  for (const int ranks : {1, 2, 3, 4, 7}) {
    for (const std::uint64_t batch : {1, 2, 5, 64}) {
      for (std::uint64_t samples = static_cast<std::uint64_t>(ranks); samples < 60; ++samples) {
        SCOPED_TRACE(testing::Message()
                     << samples << " samples, " << ranks << " ranks of " << batch);
        Taken taken = take_all(samples, ranks, {.batch_size = batch, .seed = samples});
        EXPECT_GE(taken.smallest, 1u);
        EXPECT_LE(taken.largest, batch + 1);
        std::sort(taken.samples.begin(), taken.samples.end());
        std::vector<std::size_t> all(samples);
        std::iota(all.begin(), all.end(), 0);
        EXPECT_EQ(taken.samples, all);
      }
    }
  }
}

TEST(SampleOrder, DropLastKeepsOnlyWholeBatches) {
  Taken taken = take_all(103, 3, {.batch_size = 8, .seed = 5, .drop_last = true});
  EXPECT_EQ(taken.steps, 4u);
  EXPECT_EQ(taken.smallest, 8u);
  EXPECT_EQ(taken.largest, 8u);
  std::sort(taken.samples.begin(), taken.samples.end());
  EXPECT_EQ(taken.samples.size(), 96u);
  EXPECT_EQ(std::unique(taken.samples.begin(), taken.samples.end()), taken.samples.end());
}

TEST(SampleOrder, IsOneOrderForAnyNumberOfRanks) {
  const auto order = [](int ranks, std::uint64_t batch, std::uint64_t seed, std::uint64_t epoch) {
    return take_all(100, ranks, {.batch_size = batch, .seed = seed}, epoch).samples;
  };
  EXPECT_EQ(order(1, 24, 1, 0), order(4, 6, 1, 0));
  EXPECT_EQ(order(1, 24, 1, 3), order(3, 8, 1, 3));
  EXPECT_NE(order(2, 8, 1, 0), order(2, 8, 2, 0));
  EXPECT_NE(order(2, 8, 1, 0), order(2, 8, 1, 1));

  std::vector<std::size_t> in_order(100);
  std::iota(in_order.begin(), in_order.end(), 0);
  EXPECT_EQ(take_all(100, 4, {.batch_size = 5, .shuffle = false}).samples, in_order);
}

TEST(SampleOrder, RefusesWhatLeavesARankWithoutWork) {
  const auto message = [](const std::function<void()>& attempt) {
    try {
      attempt();
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(message([] { SampleOrder(3, 0, 4, {.batch_size = 1}); }),
              HasSubstr("3 samples for 4 ranks"));
  EXPECT_THAT(message([] { SampleOrder(0, 0, 1, {}); }), HasSubstr("empty"));
  EXPECT_THAT(message([] { SampleOrder(8, 0, 1, {.batch_size = 0}); }), HasSubstr("batch_size"));
  EXPECT_THAT(message([] { SampleOrder(8, 0, 2, {.batch_size = ~0ull}); }),
              HasSubstr("out of range"));
  EXPECT_THAT(message([] { SampleOrder(8, 0, 2, {.batch_size = 5, .drop_last = true}); }),
              HasSubstr("drop_last leaves no batch"));
  EXPECT_THAT(message([] { known_size(std::nullopt); }), HasSubstr("does not know its size"));
}

}  // namespace
}  // namespace lockstep
