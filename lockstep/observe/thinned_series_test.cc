#include "lockstep/observe/thinned_series.h"

#include <gtest/gtest.h>

#include <limits>

namespace lockstep {
namespace {

TEST(ThinnedSeries, KeepsEveryPointUntilItIsFull) {
  ThinnedSeries<1> series(8);
  EXPECT_TRUE(series.points().empty());
  for (int i = 1; i <= 7; ++i) series.add(i, {10.0 * i});
  const auto points = series.points();
  ASSERT_EQ(points.size(), 7u);
  for (int i = 1; i <= 7; ++i) {
    EXPECT_EQ(points[std::size_t(i) - 1].x, i);
    EXPECT_EQ(points[std::size_t(i) - 1].values[0], 10.0 * i);
  }
}

TEST(ThinnedSeries, HalvesItsResolutionWhenFull) {
  ThinnedSeries<1> series(4);
  for (int i = 1; i <= 4; ++i) series.add(i, {double(i)});
  auto points = series.points();
  ASSERT_EQ(points.size(), 2u);
  EXPECT_EQ(points[0].x, 2);
  EXPECT_EQ(points[0].values[0], 1.5);
  EXPECT_EQ(points[1].x, 4);
  EXPECT_EQ(points[1].values[0], 3.5);
  series.add(5, {9.0});  // half of the next point, and shown at once
  points = series.points();
  ASSERT_EQ(points.size(), 3u);
  EXPECT_EQ(points[2].x, 5);
  EXPECT_EQ(points[2].values[0], 9);
}

TEST(ThinnedSeries, StaysBoundedAndKeepsTheMean) {
  ThinnedSeries<2> series(100);
  constexpr int kCount = 64 * 1024;
  for (int i = 0; i < kCount; ++i) {
    series.add(i, {double(i), 1.0});
    ASSERT_LE(series.points().size(), 100u);
  }
  const auto points = series.points();
  EXPECT_GE(points.size(), 50u);
  EXPECT_EQ(points.back().x, kCount - 1);
  for (std::size_t i = 0; i < points.size(); ++i) {
    EXPECT_EQ(points[i].values[1], 1.0);
    if (i == 0) continue;
    EXPECT_GT(points[i].x, points[i - 1].x);
    EXPECT_GT(points[i].values[0], points[i - 1].x);
  }
}

TEST(ThinnedSeries, WhatIsNoNumberTakesNoPart) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  ThinnedSeries<2> series(4);
  series.add(1, {nan, nan});
  series.add(2, {2, nan});
  series.add(3, {4, nan});
  EXPECT_TRUE(std::isnan(series.points()[0].values[0]));
  series.add(4, {nan, nan});
  const auto points = series.points();
  ASSERT_EQ(points.size(), 2u);
  EXPECT_EQ(points[0].values[0], 2);
  EXPECT_EQ(points[1].values[0], 4);
  EXPECT_TRUE(std::isnan(points[1].values[1]));
}

}  // namespace
}  // namespace lockstep
