#include "lockstep/data/ledger.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

TEST(Permutation, IsABijectionForEverySize) {
  for (std::uint64_t size = 1; size <= 2000; ++size) {
    const Permutation permutation(size, mix({size}));
    std::vector<bool> seen(size);
    for (std::uint64_t i = 0; i < size; ++i) {
      const std::uint64_t image = permutation(i);
      ASSERT_LT(image, size);
      ASSERT_FALSE(seen[image]) << "size " << size << ", position " << i;
      seen[image] = true;
    }
  }
}

TEST(Permutation, WorksOnTheLargestSizes) {
  for (const std::uint64_t size : {1ull << 32, (1ull << 62) + 1, ~0ull}) {
    const Permutation permutation(size, 7);
    std::set<std::uint64_t> images;
    for (std::uint64_t i = 0; i < 1000; ++i) {
      const std::uint64_t image = permutation(size - 1 - i);
      ASSERT_LT(image, size);
      images.insert(image);
    }
    EXPECT_EQ(images.size(), 1000u);
  }
}

// Results depend on these for ever: a change of them changes every run ever made.
TEST(Permutation, GoldenValues) {
  const auto images = [](std::uint64_t size, std::uint64_t key, std::uint64_t count) {
    std::vector<std::uint64_t> result;
    for (std::uint64_t i = 0; i < count; ++i) result.push_back(Permutation(size, key)(i));
    return result;
  };
  using Images = std::vector<std::uint64_t>;
  EXPECT_EQ(images(10, 1, 10), (Images{8, 9, 6, 5, 3, 0, 4, 2, 1, 7}));
  EXPECT_EQ(images(60000, 42, 6), (Images{32044, 57496, 22789, 19008, 9866, 21042}));
  EXPECT_EQ(images(1ull << 40, 3, 3), (Images{510153881193, 774309412267, 628165430192}));
}

TEST(Permutation, EveryPlaceIsAboutEquallyLikely) {
  constexpr std::uint64_t kSize = 20;
  constexpr int kKeys = 4000;
  std::vector<int> counts(kSize * kSize);
  for (int key = 0; key < kKeys; ++key) {
    const Permutation permutation(kSize, mix({static_cast<std::uint64_t>(key)}));
    for (std::uint64_t i = 0; i < kSize; ++i) ++counts[i * kSize + permutation(i)];
  }
  const double expected = kKeys / static_cast<double>(kSize);  // 200, deviation about 13.8
  for (const int count : counts) EXPECT_NEAR(count, expected, 5 * 13.8);
}

TEST(EvenPart, CoversInOrderWithSizesThatDifferByOne) {
  for (std::uint64_t count = 0; count < 40; ++count) {
    for (std::uint64_t parts = 1; parts < 12; ++parts) {
      std::uint64_t next = 0;
      for (std::uint64_t part = 0; part < parts; ++part) {
        const PositionRange range = even_part(count, parts, part);
        EXPECT_EQ(range.begin, next);
        EXPECT_EQ(range.size(), count / parts + (part < count % parts ? 1 : 0));
        next = range.end;
      }
      EXPECT_EQ(next, count);
    }
  }
}

TEST(Ledger, EveryPositionOfAnEpochExactlyOnce) {
  for (const std::uint64_t samples : {1u, 2u, 7u, 64u, 65u, 1000u}) {
    for (const std::uint64_t batch : {1u, 3u, 64u, 2000u}) {
      for (const int virtual_ranks : {1, 2, 3, 8}) {
        const Ledger ledger(
            {.samples = samples, .global_batch_size = batch, .virtual_ranks = virtual_ranks});
        std::vector<int> seen(samples);
        std::vector<int> seen_index(samples);
        const auto epoch = ledger.epoch(3);
        for (std::uint64_t step = 0; step < ledger.steps_per_epoch(); ++step) {
          std::uint64_t in_step = 0;
          for (int v = 0; v < virtual_ranks; ++v) {
            const PositionRange range = ledger.positions(step, v);
            ASSERT_LE(range.begin, range.end);
            in_step += range.size();
            for (std::uint64_t p = range.begin; p < range.end; ++p) {
              ++seen.at(p);
              ++seen_index.at(epoch.index(p));
            }
          }
          EXPECT_EQ(in_step, ledger.batch_size(step));
        }
        EXPECT_EQ(seen, std::vector<int>(samples, 1));
        EXPECT_EQ(seen_index, std::vector<int>(samples, 1));
      }
    }
  }
}

TEST(Ledger, OnlyTheLastBatchIsShort) {
  const Ledger ledger({.samples = 10, .global_batch_size = 4, .virtual_ranks = 4});
  EXPECT_EQ(ledger.steps_per_epoch(), 3u);
  EXPECT_EQ(ledger.batch_size(0), 4u);
  EXPECT_EQ(ledger.batch_size(2), 2u);
  EXPECT_EQ(ledger.positions(1, 3), (PositionRange{7, 8}));
  EXPECT_EQ(ledger.positions(2, 1), (PositionRange{9, 10}));
  EXPECT_EQ(ledger.positions(2, 3).size(), 0u);
}

TEST(Ledger, OrderFollowsFromSeedAndEpoch) {
  const auto order = [](std::uint64_t seed, std::uint64_t epoch, bool shuffle = true) {
    const Ledger ledger({.samples = 100, .seed = seed, .shuffle = shuffle});
    std::vector<std::uint64_t> result;
    for (std::uint64_t p = 0; p < 100; ++p) result.push_back(ledger.epoch(epoch).index(p));
    return result;
  };
  EXPECT_EQ(order(1, 0), order(1, 0));
  EXPECT_NE(order(1, 0), order(1, 1));
  EXPECT_NE(order(1, 0), order(2, 0));
  EXPECT_EQ(order(1, 0, false), order(2, 5, false));
  EXPECT_EQ(order(1, 0, false)[17], 17u);
}

}  // namespace
}  // namespace lockstep
