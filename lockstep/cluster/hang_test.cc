#include "lockstep/cluster/hang.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using testing::ElementsAre;
using testing::IsEmpty;

// Looks ten times a second at members that never change; who is named at the end.
std::vector<std::uint64_t> named(HangWatch& watch, const std::vector<HangWatch::Member>& members,
                                 Clock::time_point& now, Clock::duration passing) {
  std::vector<std::uint64_t> ids;
  for (const auto end = now + passing; now <= end; now += 100ms) {
    ids.clear();
    for (const HangWatch::Hung& hung : watch.look(members, now)) ids.push_back(hung.id);
  }
  return ids;
}

HangWatch::Member member(std::uint64_t id, std::uint64_t call, std::uint64_t progress = 0) {
  return {id, {{1, call, 0}, progress}};
}

class HangTest : public testing::Test {
 protected:
  HangWatch watch_{2s};
  Clock::time_point now_{1h};
};

TEST_F(HangTest, NamesWhoTheOthersWaitFor) {
  const std::vector members = {member(1, 8), member(2, 7), member(3, 8)};
  EXPECT_THAT(named(watch_, members, now_, 1900ms), IsEmpty());
  EXPECT_THAT(named(watch_, members, now_, 200ms), ElementsAre(2));
}

TEST_F(HangTest, NamesAllWhenNobodyGetsFurther) {
  EXPECT_THAT(named(watch_, {member(1, 7), member(2, 7)}, now_, 2100ms), ElementsAre(1, 2));
}

TEST_F(HangTest, NobodyWhoWorksIsNamedHoweverLongOthersWait) {
  for (std::uint64_t progress = 0; progress < 10; ++progress)
    EXPECT_THAT(named(watch_, {member(1, 8), member(2, 7, progress)}, now_, 1s), IsEmpty());
}

TEST_F(HangTest, NobodyIsNamedWhileOthersWork) {
  for (std::uint64_t progress = 0; progress < 10; ++progress)
    EXPECT_THAT(named(watch_, {member(1, 7), member(2, 7, progress)}, now_, 1s), IsEmpty());
}

TEST_F(HangTest, WhoHasNotJoinedIsAwaitedByThoseWhoHave) {
  const std::vector<HangWatch::Member> members = {{1, {{3, 9, 0}, 0}}, {2, {{2, 50, 7}, 0}}};
  EXPECT_THAT(named(watch_, members, now_, 2100ms), ElementsAre(2));
}

TEST_F(HangTest, PhasesWithinACallCount) {
  const std::vector<HangWatch::Member> members = {{1, {{1, 9, 3}, 0}}, {2, {{1, 9, 4}, 0}}};
  EXPECT_THAT(named(watch_, members, now_, 2100ms), ElementsAre(1));
}

TEST_F(HangTest, ANewMemberHasItsTime) {
  named(watch_, {member(1, 8)}, now_, 1s);
  EXPECT_THAT(named(watch_, {member(1, 8), member(2, 7)}, now_, 1900ms), IsEmpty());
}

TEST_F(HangTest, APauseOfTheWatchIsNobodysFault) {
  const std::vector members = {member(1, 8), member(2, 7)};
  named(watch_, members, now_, 1s);
  now_ += 1h;
  EXPECT_THAT(named(watch_, members, now_, 1900ms), IsEmpty());
  EXPECT_THAT(named(watch_, members, now_, 200ms), ElementsAre(2));
}

}  // namespace
}  // namespace lockstep
