#include "lockstep/memory/flight_recorder.h"

#include <gtest/gtest.h>

#include <memory>

namespace lockstep {
namespace {

class FlightRecorderTest : public ::testing::Test {
 protected:
  std::uint64_t add(std::uint64_t word) {
    const std::uint64_t serial = claim_record(*recorder_);
    open_record(*recorder_, serial, {word});
    return serial;
  }
  std::unique_ptr<FlightRecorder> recorder_ = std::make_unique<FlightRecorder>();
};

TEST_F(FlightRecorderTest, OpenUntilClosed) {
  EXPECT_TRUE(read_records(*recorder_).empty());
  EXPECT_EQ(add(7), 1u);
  EXPECT_EQ(read_records(*recorder_).at(0).ended_at_ns, 0);
  close_record(*recorder_, 1, 50, 6);
  const auto records = read_records(*recorder_);
  ASSERT_EQ(records.size(), 1u);
  EXPECT_EQ(records[0].serial, 1u);
  EXPECT_EQ(records[0].ended_at_ns, 50);
  EXPECT_EQ(records[0].outcome, 6u);
  EXPECT_EQ(records[0].words[0], 7u);
  EXPECT_TRUE(read_records(*recorder_, 1).empty());
}

TEST_F(FlightRecorderTest, KeepsTheLastOnes) {
  for (std::uint64_t i = 1; i <= 2500; ++i) close_record(*recorder_, add(i), 1, 1);
  const auto records = read_records(*recorder_);
  ASSERT_EQ(records.size(), kRecordedOperations);
  for (std::size_t i = 0; i < records.size(); ++i) {
    EXPECT_EQ(records[i].serial, 2500 - kRecordedOperations + 1 + i);
    EXPECT_EQ(records[i].words[0], records[i].serial);
  }
  EXPECT_EQ(read_records(*recorder_, 2498).size(), 2u);
}

TEST_F(FlightRecorderTest, WhatDoesNotBelongInItsSlotIsLeftOut) {
  for (std::uint64_t i = 1; i <= 3; ++i) add(i);
  recorder_->records[2].serial.store(9);
  EXPECT_EQ(read_records(*recorder_).size(), 2u);
  for (const std::uint64_t opened : {std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    recorder_->opened.store(opened);
    EXPECT_TRUE(read_records(*recorder_).empty());
  }
}

}  // namespace
}  // namespace lockstep
