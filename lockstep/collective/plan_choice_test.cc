#include "lockstep/collective/plan_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr LinkCosts kGigabit{.latency_s = 50e-6, .bandwidth_bytes_per_s = 125e6};

AllReducePlan plan_for(int size, std::size_t bytes, bool exact = true,
                       const LinkCosts& costs = kGigabit) {
  return choose_all_reduce(costs, size, bytes, exact, bytes <= 4096).plan;
}

TEST(PlanChoiceTest, LittleGoesToAllAndMuchToItsOwner) {
  for (const int size : {2, 3, 4, 5}) {
    EXPECT_EQ(plan_for(size, 64), AllReducePlan::to_all) << size;
    EXPECT_EQ(plan_for(size, 64 << 20), AllReducePlan::direct) << size;
  }
}

TEST(PlanChoiceTest, ManyRanksSendFewMessages) {
  EXPECT_EQ(plan_for(64, 64), AllReducePlan::to_all);  // nothing is left to send
  EXPECT_EQ(plan_for(64, 5000), AllReducePlan::direct);
  // Where a message costs as much as its way.
  const LinkCosts costs{.latency_s = 5e-6, .message_s = 5e-6};
  EXPECT_EQ(plan_for(64, 5000, true, costs), AllReducePlan::doubling);
  EXPECT_EQ(plan_for(64, 1 << 20, true, costs), AllReducePlan::halving);
  EXPECT_EQ(plan_for(63, 5000, true, costs), AllReducePlan::tree);  // the others aren't canonical
  EXPECT_EQ(plan_for(63, 5000, false, costs), AllReducePlan::doubling);
}

TEST(PlanChoiceTest, OnlyCanonicalPlansWhereThatIsAsked) {
  const LinkCosts strange[] = {{.latency_s = 1e-9},
                               {.latency_s = 1},
                               {.message_s = 1e-9},
                               {.message_s = 1},
                               {.bandwidth_bytes_per_s = 1e3}};
  for (const LinkCosts& costs : strange)
    for (int size = 1; size <= 70; ++size)
      for (const std::size_t bytes : {0, 100, 10'000, 100'000'000}) {
        const AllReducePlan plan = plan_for(size, bytes, true, costs);
        EXPECT_NE(plan, AllReducePlan::ring);
        if ((size & (size - 1)) != 0) {
          EXPECT_NE(plan, AllReducePlan::doubling);
          EXPECT_NE(plan, AllReducePlan::halving);
        }
      }
}

TEST(PlanChoiceTest, TheEnginesOwnWhereItIsFasterAndNothingIsExact) {
  LinkCosts costs = kGigabit;
  costs.engine_s = 60e-6;
  costs.engine_bytes_per_s = 200e6;
  EXPECT_EQ(plan_for(4, 8 << 20, false, costs), AllReducePlan::engine);
  EXPECT_EQ(plan_for(4, 8 << 20, true, costs), AllReducePlan::direct);
  EXPECT_EQ(plan_for(4, 64, false, costs), AllReducePlan::to_all);
  costs.engine_bytes_per_s = 20e6;
  EXPECT_NE(plan_for(4, 8 << 20, false, costs), AllReducePlan::engine);
}

TEST(PlanChoiceTest, TheReasonHasTheNumbers) {
  EXPECT_THAT(choose_all_reduce(kGigabit, 4, 8 << 20, true, false).reason,
              AllOf(StartsWith("direct: "), HasSubstr("4 ranks, 8388608 bytes, 50 us latency, 125 "
                                                      "MB/s, canonical order")));
}

}  // namespace
}  // namespace lockstep
