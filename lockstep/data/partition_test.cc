#include "lockstep/data/partition.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <set>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/data/ledger.h"

namespace lockstep {
namespace {

using Kind = Partition::Kind;
using testing::HasSubstr;

std::vector<std::uint64_t> some_keys(std::uint64_t samples, std::uint64_t distinct) {
  std::vector<std::uint64_t> keys(samples);
  for (std::uint64_t i = 0; i < samples; ++i) keys[i] = 1000 + mix({i, 5}) % distinct;
  return keys;
}

// Every sample of an epoch by step and virtual rank.
std::vector<std::vector<std::vector<std::uint64_t>>> taken(const Ledger& ledger, int virtual_ranks,
                                                           std::uint64_t epoch = 0) {
  const Ledger::Epoch order = ledger.epoch(epoch);
  std::vector<std::vector<std::vector<std::uint64_t>>> steps(ledger.steps_per_epoch());
  for (std::uint64_t s = 0; s < steps.size(); ++s) {
    std::uint64_t size = 0;
    for (int v = 0; v < virtual_ranks; ++v) {
      const PositionRange range = ledger.positions(s, v);
      auto& indices = steps[s].emplace_back();
      for (std::uint64_t p = range.begin; p < range.end; ++p) indices.push_back(order.index(p));
      size += range.size();
    }
    EXPECT_EQ(size, ledger.batch_size(s));
  }
  return steps;
}

std::vector<std::uint64_t> flat(const std::vector<std::vector<std::vector<std::uint64_t>>>& steps) {
  std::vector<std::uint64_t> all;
  for (const auto& step : steps)
    for (const auto& part : step) all.insert(all.end(), part.begin(), part.end());
  return all;
}

std::string refusal(const std::function<void()>& attempt) {
  try {
    attempt();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Partition, RangeHashAndStratifiedTakeEverySampleOnce) {
  for (const Kind kind : {Kind::none, Kind::range, Kind::hash, Kind::stratified}) {
    for (const int ranks : {1, 2, 3, 4}) {
      for (std::uint64_t samples = 1; samples < 70; ++samples) {
        for (const std::uint64_t batch : {1, 4, 7, 16, 100}) {
          for (const bool shuffle : {true, false}) {
            SCOPED_TRACE(testing::Message() << name_of(kind) << ", " << ranks << " ranks, "
                                            << samples << " samples in batches of " << batch);
            Ledger::Options options{.samples = samples,
                                    .global_batch_size = batch,
                                    .virtual_ranks = ranks,
                                    .seed = samples,
                                    .shuffle = shuffle,
                                    .partition = {kind, some_keys(samples, 5)}};
            std::optional<Ledger> ledger;
            try {
              ledger.emplace(options);
            } catch (const ConfigError& error) {  // a virtual rank would go without
              ASSERT_TRUE(kind == Kind::range || kind == Kind::hash);
              continue;
            }
            std::vector<std::uint64_t> all = flat(taken(*ledger, ranks));
            std::ranges::sort(all);
            std::vector<std::uint64_t> expected(samples);
            std::iota(expected.begin(), expected.end(), 0);
            ASSERT_EQ(all, expected);
          }
        }
      }
    }
  }
}

TEST(Partition, RangeGivesNeighboursToOneVirtualRankInEveryEpoch) {
  const Ledger ledger(
      {.samples = 103, .global_batch_size = 12, .virtual_ranks = 4, .partition = {Kind::range}});
  for (const std::uint64_t epoch : {0, 1}) {
    const auto steps = taken(ledger, 4, epoch);
    for (const auto& step : steps)
      for (std::uint64_t v = 0; v < 4; ++v) {
        EXPECT_GE(step[v].size(), 2u);
        EXPECT_LE(step[v].size(), 3u);
        for (const std::uint64_t index : step[v]) {
          EXPECT_GE(index, even_part(103, 4, v).begin);
          EXPECT_LT(index, even_part(103, 4, v).end);
        }
      }
  }
  EXPECT_NE(flat(taken(ledger, 4, 0)), flat(taken(ledger, 4, 1)));
}

TEST(Partition, HashKeepsAKeyOnOneVirtualRank) {
  const std::vector<std::uint64_t> keys = some_keys(200, 23);
  const Ledger ledger({.samples = 200,
                       .global_batch_size = 40,
                       .virtual_ranks = 3,
                       .partition = {Kind::hash, keys}});
  std::map<std::uint64_t, std::set<std::size_t>> homes;
  for (const std::uint64_t epoch : {0, 1, 2})
    for (const auto& step : taken(ledger, 3, epoch))
      for (std::size_t v = 0; v < 3; ++v)
        for (const std::uint64_t index : step[v]) homes[keys[index]].insert(v);
  EXPECT_EQ(homes.size(), 23u);
  std::set<std::size_t> used;
  for (const auto& [key, ranks] : homes) {
    EXPECT_EQ(ranks.size(), 1u) << key;
    used.insert(ranks.begin(), ranks.end());
  }
  EXPECT_EQ(used.size(), 3u);
}

TEST(Partition, StratifiedKeepsEveryWindowInProportion) {
  std::vector<std::uint64_t> keys(500, 7);
  for (std::uint64_t i = 0; i < keys.size(); ++i)
    if (i < 50) keys[i] = i < 10 ? 1 : 2;
  const Ledger ledger({.samples = 500,
                       .global_batch_size = 50,
                       .virtual_ranks = 2,
                       .partition = {Kind::stratified, keys}});
  for (const auto& step : taken(ledger, 2)) {
    std::map<std::uint64_t, int> counts;
    for (const auto& part : step) {
      std::map<std::uint64_t, int> own;
      for (const std::uint64_t index : part) ++own[keys[index]], ++counts[keys[index]];
      EXPECT_NEAR(own[7], 22.5, 1.0);
      EXPECT_NEAR(own[2], 2, 1.0);
    }
    EXPECT_NEAR(counts[1], 1, 1.0);
    EXPECT_NEAR(counts[2], 4, 1.0);
  }
}

// Pearson's statistic against the expected counts stays below the 99.9 % quantile.
TEST(Partition, WeightedDrawsInProportion) {
  constexpr std::uint64_t kSamples = 20000;
  std::vector<double> weights(kSamples);
  for (std::uint64_t i = 0; i < kSamples; ++i) weights[i] = static_cast<double>(i % 10);
  const Ledger ledger({.samples = kSamples,
                       .global_batch_size = 100,
                       .virtual_ranks = 2,
                       .partition = {Kind::weighted, {}, weights}});
  std::set<std::vector<std::uint64_t>> orders;
  for (const std::uint64_t epoch : {0, 1, 2}) {
    const std::vector<std::uint64_t> all = flat(taken(ledger, 2, epoch));
    std::vector<double> counts(10);
    for (const std::uint64_t index : all) ++counts[index % 10];
    EXPECT_EQ(counts[0], 0);  // a weight of 0 is never drawn
    double statistic = 0;
    for (std::size_t i = 1; i < 10; ++i) {
      const double expected = kSamples * static_cast<double>(i) / 45;
      statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    EXPECT_LT(statistic, 26.1) << "8 degrees of freedom";
    EXPECT_GT(std::set<std::uint64_t>(all.begin(), all.end()).size(), kSamples / 3);
    EXPECT_EQ(flat(taken(ledger, 2, epoch)), all);
    orders.insert(all);
  }
  EXPECT_EQ(orders.size(), 3u);
}

TEST(Partition, WeightedAtTheEdges) {
  const PartitionTable table({Kind::weighted, {}, {0, 3, 0, 1, 0}}, 5, 1, 1);
  EXPECT_EQ(table.draw(0), 1u);
  EXPECT_EQ(table.draw(~std::uint64_t{0}), 3u);
  EXPECT_EQ(table.draw(std::uint64_t{3} << 62), 3u);
  EXPECT_EQ(table.draw((std::uint64_t{3} << 62) - 2048), 1u);
  EXPECT_EQ(balancing_weights({4, 4, 9, 4, 4}), (std::vector<double>{0.25, 0.25, 1.0, 0.25, 0.25}));
}

// Results depend on these for ever.
TEST(Partition, GoldenValues) {
  const auto first = [](Partition partition) {
    const Ledger ledger({.samples = 12,
                         .global_batch_size = 6,
                         .virtual_ranks = 2,
                         .seed = 3,
                         .partition = std::move(partition)});
    return flat(taken(ledger, 2, 1));
  };
  const std::vector<std::uint64_t> keys = {0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3};
  EXPECT_EQ(first({Kind::range}),
            (std::vector<std::uint64_t>{5, 0, 4, 7, 8, 11, 1, 2, 3, 6, 10, 9}));
  EXPECT_EQ(first({Kind::hash, keys}),
            (std::vector<std::uint64_t>{8, 0, 7, 4, 5, 11, 1, 2, 6, 3, 10, 9}));
  EXPECT_EQ(first({Kind::stratified, keys}),
            (std::vector<std::uint64_t>{2, 3, 6, 10, 0, 5, 7, 11, 1, 4, 8, 9}));
  EXPECT_EQ(first({Kind::weighted, {}, std::vector<double>(12, 0.5)}),
            (std::vector<std::uint64_t>{8, 9, 10, 7, 4, 1, 11, 9, 10, 10, 11, 1}));
}

TEST(Partition, RefusesWhatDoesNotFit) {
  const auto with = [](Partition partition) {
    return refusal([&] {
      Ledger({.samples = 4, .global_batch_size = 2, .virtual_ranks = 2, .partition = partition});
    });
  };
  EXPECT_THAT(with({Kind::hash, {1, 2, 3}}), HasSubstr("3 keys for 4 samples"));
  EXPECT_THAT(with({Kind::hash, {1, 1, 1, 1}}), HasSubstr("has 0 samples for 2 steps"));
  EXPECT_THAT(with({Kind::weighted, {}, {1}}), HasSubstr("1 weights for 4 samples"));
  EXPECT_THAT(with({Kind::weighted, {}, {1, -1, 1, 1}}), HasSubstr("the weight of sample 1 is -1"));
  EXPECT_THAT(with({Kind::weighted, {}, {1, std::nan(""), 1, 1}}), HasSubstr("sample 1"));
  EXPECT_THAT(with({Kind::weighted, {}, {0, 0, 0, 0}}), HasSubstr("all weights are 0"));
  EXPECT_THAT(refusal([] { partition_kind("hsah"); }), HasSubstr("hash"));
  EXPECT_EQ(partition_kind("stratified"), Kind::stratified);
}

}  // namespace
}  // namespace lockstep
