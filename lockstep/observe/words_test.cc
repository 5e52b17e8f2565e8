#include "lockstep/observe/words.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace lockstep {
namespace {

TEST(Words, Bytes) {
  EXPECT_EQ(words_for_bytes(0), "0 B");
  EXPECT_EQ(words_for_bytes(999), "999 B");
  EXPECT_EQ(words_for_bytes(1000), "1.0 kB");
  EXPECT_EQ(words_for_bytes(12'345), "12.3 kB");
  EXPECT_EQ(words_for_bytes(999'949), "999.9 kB");
  EXPECT_EQ(words_for_bytes(999'950), "1.0 MB");
  EXPECT_EQ(words_for_bytes(~std::uint64_t{0}), "18.4 EB");
}

TEST(Words, Counts) {
  EXPECT_EQ(words_for_count(0), "0");
  EXPECT_EQ(words_for_count(999.4), "999");
  EXPECT_EQ(words_for_count(999.6), "1,000");
  EXPECT_EQ(words_for_count(1234567), "1,234,567");
  EXPECT_EQ(words_for_count(-1234), "-1,234");
  EXPECT_EQ(words_for_count(std::numeric_limits<double>::infinity()), "inf");
}

TEST(Words, Durations) {
  EXPECT_EQ(words_for_duration(0), "0:00");
  EXPECT_EQ(words_for_duration(6.2), "0:07");
  EXPECT_EQ(words_for_duration(754), "12:34");
  EXPECT_EQ(words_for_duration(3723), "1:02:03");
  EXPECT_EQ(words_for_duration(std::nan("")), "?");
  EXPECT_EQ(words_for_duration(1e30), "?");
}

TEST(Words, Losses) {
  EXPECT_EQ(words_for_loss(0.51234), "0.5123");
  EXPECT_EQ(words_for_loss(0), "0.0000");
  EXPECT_EQ(words_for_loss(3.21e-5), "3.210e-05");
  EXPECT_EQ(words_for_loss(123456), "1.235e+05");
  EXPECT_EQ(words_for_loss(std::nan("")), "nan");
}

TEST(Words, Tables) {
  EXPECT_EQ(table_of({{"epoch", "loss"}, {"1", "0.5"}, {"10", ""}}),
            "epoch  loss\n"
            "    1   0.5\n"
            "   10\n");
  EXPECT_EQ(table_of({{"a", "1"}, {"long", "22"}}, 1),
            "a      1\n"
            "long  22\n");
  EXPECT_EQ(table_of({}), "");
}

}  // namespace
}  // namespace lockstep
