// What the membership machine does, told as short stories: reports in, reasons out.
#include "lockstep/cluster/membership.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>

#include "lockstep/base/error.h"
#include "lockstep/cluster/membership_story_test.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using membership_story::Job;
using membership_story::kKilled;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(Membership, BeginsWhenAllAreReady) {
  Job job({.least = 2, .most = 2});
  EXPECT_THAT(job.settle(), ElementsAre("2 workers start"));
  job.rosters[0].ready(1);
  EXPECT_THAT(job.settle(), IsEmpty());
  EXPECT_THAT(job.ready(), ElementsAre("2 workers begin"));
  EXPECT_EQ(job.generation().number, 0u);
  EXPECT_TRUE(job.generation().at_once());
  EXPECT_THAT(job.members(), ElementsAre(0, 1));
  EXPECT_THAT(job.commit(), IsEmpty());
}

TEST(Membership, BeginsWithFewerWhenTheOthersTakeTooLong) {
  Job job({.least = 1, .most = 3});
  job.settle();
  job.rosters[0].ready(2);
  EXPECT_THAT(job.settle(), IsEmpty());
  EXPECT_EQ(job.again, job.now + 60s);
  EXPECT_THAT(job.later(60s), ElementsAre("1 worker begin"));
  EXPECT_THAT(job.members(), ElementsAre(2));
  job.commit();
  EXPECT_THAT(job.ready(),
              ElementsAre("2 workers join at the end of a step: going on with 3 workers"));
}

TEST(Membership, GoesOnWithFewerUntilTheReplacementJoins) {
  Job job({.least = 2, .most = 4});
  job.begin();
  EXPECT_THAT(job.die(2),
              ElementsAre("rank 2 (pid 2) killed by signal 9 (SIGKILL): going on with 3 "
                          "workers; a replacement starts (1 of 10 restarts in 60 s)"));
  EXPECT_THAT(job.members(), ElementsAre(0, 1, 3));
  EXPECT_TRUE(job.generation().at_once());
  EXPECT_EQ(job.over, 1u);
  // It is ready before the survivors have committed a step: they are not disturbed.
  EXPECT_THAT(job.ready(), IsEmpty());
  EXPECT_THAT(job.commit(),
              ElementsAre("1 worker joins at the end of a step: going on with 4 workers"));
  EXPECT_FALSE(job.generation().at_once());
  EXPECT_EQ(job.over, 1u);
  EXPECT_THAT(job.members(), ElementsAre(0, 1, 3, 4));
  EXPECT_THAT(job.commit(), IsEmpty());
}

TEST(Membership, WaitsBelowTheLeast) {
  Job job({.least = 2, .most = 2});
  job.begin();
  EXPECT_THAT(
      job.die(0),
      ElementsAre(
          "rank 0 (pid 0) killed by signal 9 (SIGKILL): 1 worker left and at least 2 needed, "
          "waiting; a replacement starts (1 of 10 restarts in 60 s)"));
  EXPECT_EQ(job.generation().number, 0u);
  EXPECT_EQ(job.over, 1u);  // the survivor need not wait for the dead
  EXPECT_THAT(job.ready(), ElementsAre("rank 0 (pid 0) killed by signal 9 (SIGKILL): going on with "
                                       "2 workers, 1 of them new"));
  EXPECT_THAT(job.members(), ElementsAre(1, 2));
}

TEST(Membership, AStandbyTakesThePlaceAtOnce) {
  Job job({.least = 2, .most = 2, .standby = 1});
  EXPECT_THAT(job.settle(), ElementsAre("3 workers start"));
  job.ready();
  EXPECT_THAT(
      job.die(1),
      ElementsAre("rank 1 (pid 1) killed by signal 9 (SIGKILL): going on with 2 workers, 1 of "
                  "them new; a replacement starts (1 of 10 restarts in 60 s)"));
  EXPECT_THAT(job.members(), ElementsAre(0, 2));
  EXPECT_THAT(job.ready(), IsEmpty());  // the standby's successor
  EXPECT_THAT(job.die(3), ElementsAre("a waiting worker (pid 3) killed by signal 9 (SIGKILL): a "
                                      "replacement starts (2 of 10 restarts in 60 s)"));
  EXPECT_EQ(job.generation().number, 1u);
}

TEST(Membership, ADyingMemberIsFencedFirst) {
  Job job({.least = 1, .most = 2});
  job.begin();
  job.rosters[0].killing(1, "made no progress for 5 s");
  EXPECT_THAT(job.settle(),
              ElementsAre("rank 1 (pid 1) made no progress for 5 s: waiting for the end of who is "
                          "being killed; a replacement starts (1 of 10 restarts in 60 s)"));
  EXPECT_EQ(job.generation().number, 0u);
  EXPECT_THAT(job.die(1), ElementsAre("rank 1 (pid 1) made no progress for 5 s: going on with 1 "
                                      "worker"));
  EXPECT_THAT(job.members(), ElementsAre(0));
}

TEST(Membership, TwoDeathsAtOnceAreOneGeneration) {
  Job job({.least = 1, .most = 4});
  job.begin();
  job.rosters[0].ended(0, WorkerState::failed, kKilled);
  EXPECT_THAT(
      job.die(3, "killed by the kernel: out of memory"),
      ElementsAre("rank 0 (pid 0) killed by signal 9 (SIGKILL); rank 3 (pid 3) killed by the "
                  "kernel: out of memory: going on with 2 workers; 2 replacements start (2 "
                  "of 10 restarts in 60 s)"));
  EXPECT_THAT(job.members(), ElementsAre(1, 2));
}

TEST(Membership, ADeathDuringRecovery) {
  Job job({.least = 1, .most = 3});
  job.begin();
  job.die(0);
  EXPECT_THAT(job.die(1),
              ElementsAre("rank 0 (pid 1) killed by signal 9 (SIGKILL): going on with 1 "
                          "worker; a replacement starts (2 of 10 restarts in 60 s)"));
  EXPECT_THAT(job.members(), ElementsAre(2));
  EXPECT_EQ(job.over, 2u);
}

TEST(Membership, RestartsAreLimitedWithinAWindow) {
  Job job({.least = 1, .most = 2, .max_restarts = 1});
  job.begin();
  job.die(0);
  job.commit();
  job.ready();
  job.commit();
  EXPECT_THAT(job.die(1),
              ElementsAre("rank 0 (pid 1) killed by signal 9 (SIGKILL): going on with 1 "
                          "worker; no more replacement: 1 of 1 restarts in 60 s"));
  EXPECT_EQ(job.again, job.now + 60s);
  EXPECT_THAT(job.later(59s), IsEmpty());
  EXPECT_THAT(job.later(1s), ElementsAre("a replacement starts (1 of 1 restarts in 60 s)"));
}

TEST(Membership, EndsBelowTheLeastWithoutRestarts) {
  Job job({.least = 2, .most = 2, .max_restarts = 0});
  job.begin();
  EXPECT_THAT(job.die(1), ElementsAre("rank 1 (pid 1) killed by signal 9 (SIGKILL): 1 worker left "
                                      "and at least 2 needed, but no restart is left: 0 of 0 "
                                      "restarts in 60 s"));
  ASSERT_TRUE(job.end);
  EXPECT_FALSE(job.end->ok);
  EXPECT_THAT(job.settle(), IsEmpty());
}

TEST(Membership, AWorkersOwnErrorEndsTheJob) {
  Job job({.least = 1, .most = 2});
  job.begin();
  job.rosters[0].ended(1, WorkerState::failed, "exited with code 2", true);
  EXPECT_THAT(job.settle(), ElementsAre("rank 1 (pid 1) exited with code 2"));
  ASSERT_TRUE(job.end);
  EXPECT_FALSE(job.end->ok);
}

TEST(Membership, AReplacementsOwnErrorEndsReplacing) {
  Job job({.least = 1, .most = 2});
  job.begin();
  job.die(0);
  job.rosters[0].ended(2, WorkerState::failed, "exited with code 2", true);
  EXPECT_THAT(job.settle(), ElementsAre("a starting worker (pid 2) exited with code 2: no "
                                        "replacement: a starting worker (pid 2) exited with code "
                                        "2"));
  EXPECT_FALSE(job.end);
  job.die(1);
  ASSERT_TRUE(job.end);
  EXPECT_THAT(job.end->reason, HasSubstr("0 workers left and at least 1 needed, but to start "
                                         "another is pointless: a starting worker"));
}

TEST(Membership, ScalesDownAndUp) {
  Job job({.least = 1, .most = 4});
  job.begin();
  EXPECT_THAT(
      job.scale(2),
      ElementsAre("scaled from 4 to 2 workers: the last 2 ranks leave at the end of a step"));
  EXPECT_THAT(job.members(), ElementsAre(0, 1));
  EXPECT_FALSE(job.generation().at_once());
  job.commit();
  EXPECT_THAT(job.finish(2), IsEmpty());
  EXPECT_THAT(job.finish(3), IsEmpty());
  EXPECT_THAT(job.scale(3), ElementsAre("1 worker starts"));
  EXPECT_THAT(job.ready(),
              ElementsAre("1 worker joins at the end of a step: going on with 3 workers"));
  EXPECT_THAT(job.members(), ElementsAre(0, 1, 4));
  EXPECT_THROW(job.scale(5), ConfigError);
  EXPECT_THROW(job.scale(0), ConfigError);
}

TEST(Membership, WhoeverStartedInVainIsEnded) {
  Job job({.least = 1, .most = 2});
  job.begin();
  job.die(1);
  EXPECT_THAT(job.scale(1), ElementsAre("1 worker not needed any more: 1 worker at work"));
  EXPECT_EQ(job.rosters[0].workers().size(), 2u);  // the dead member's seat is kept
  job.commit();
  EXPECT_EQ(job.rosters[0].workers().size(), 1u);
}

// Rank 2 is to leave and may still be at work when rank 0 dies: the next generation has it, so that
// it does not go on with the old step behind the others' backs.
TEST(Membership, WhoIsLeavingStaysWhenSomebodyDies) {
  Job job({.least = 1, .most = 3});
  job.begin();
  job.scale(2);
  EXPECT_THAT(job.die(0),
              ElementsAre("rank 0 (pid 0) killed by signal 9 (SIGKILL): going on with 2 "
                          "workers"));
  EXPECT_THAT(job.members(), ElementsAre(1, 2));
  EXPECT_TRUE(job.generation().at_once());
}

// It may have left by then: that is not the job's end, and others are still replaced.
TEST(Membership, WhoWasToLeaveAndLeavesHasNotFinishedTheJob) {
  Job job({.least = 1, .most = 2});
  job.begin();
  job.scale(1);
  job.die(0);
  EXPECT_THAT(job.members(), ElementsAre(1));
  EXPECT_THAT(job.finish(1), ElementsAre("1 worker starts"));
  EXPECT_FALSE(job.end);
  job.ready();
  EXPECT_THAT(job.members(), ElementsAre(2));

  Job larger({.least = 2, .most = 3});
  larger.begin();
  larger.scale(2);
  larger.die(0);
  EXPECT_THAT(larger.members(), ElementsAre(1, 2));
  larger.finish(2);
  larger.ready();
  EXPECT_THAT(larger.members(), ElementsAre(1, 3));
  EXPECT_FALSE(larger.end);
}

// Once the generation that has it is taken up, it takes part until the end.
TEST(Membership, WhoWasToLeaveAndStayedFinishesTheJob) {
  Job job({.least = 1, .most = 2});
  job.begin();
  job.scale(1);
  job.die(0);
  job.commit();
  job.finish(1);
  ASSERT_TRUE(job.end);
  EXPECT_TRUE(job.end->ok);
}

TEST(Membership, ADeathOfWhoIsLeaving) {
  Job job({.least = 1, .most = 3});
  job.begin();
  job.scale(2);
  EXPECT_THAT(job.die(2),
              ElementsAre("former rank 2 (pid 2) killed by signal 9 (SIGKILL): going on "
                          "with 2 workers"));
  EXPECT_TRUE(job.generation().at_once());
}

TEST(Membership, ANewcomerDiesBeforeItWasTakenUp) {
  Job job({.least = 1, .most = 2});
  job.begin();
  job.die(0);
  job.commit();
  job.ready();
  EXPECT_THAT(job.members(), ElementsAre(1, 2));
  EXPECT_THAT(job.die(2),
              ElementsAre("rank 1 (pid 2) killed by signal 9 (SIGKILL): going on with 1 "
                          "worker; a replacement starts (2 of 10 restarts in 60 s)"));
  EXPECT_TRUE(job.generation().at_once());
}

TEST(Membership, AFailedGroupWithoutADeath) {
  Job job({.least = 2, .most = 2});
  job.begin();
  job.rosters[0].comm_error(0, 0, "all_reduce 'loss': rank 1 called barrier");
  EXPECT_THAT(job.settle(), IsEmpty());
  EXPECT_EQ(job.again, job.now + 1s);
  EXPECT_THAT(
      job.later(1s),
      ElementsAre("rank 0 (pid 0) reported: all_reduce 'loss': rank 1 called barrier; nobody "
                  "died within 1 s (1 of 10 restarts in 60 s): going on with 2 workers"));
  EXPECT_THAT(job.members(), ElementsAre(0, 1));
  job.rosters[0].comm_error(1, 1, "again");
  job.settle();
  EXPECT_THAT(job.later(1s),
              ElementsAre("rank 1 (pid 1) reported: again; for the second time after "
                          "step 1, and nobody died"));
  EXPECT_TRUE(job.end);
}

TEST(Membership, AFailedGroupIsExplainedByADeath) {
  Job job({.least = 1, .most = 2});
  job.begin();
  job.rosters[0].comm_error(0, 0, "rank 1 is gone");
  job.settle();
  EXPECT_THAT(job.die(1),
              ElementsAre(HasSubstr("going on with 1 worker; a replacement starts (1 of")));
  EXPECT_THAT(job.later(10s), IsEmpty());
}

TEST(Membership, EndsWhenAllHaveFinished) {
  Job job({.least = 2, .most = 2, .standby = 1});
  job.begin();
  EXPECT_THAT(job.finish(0), ElementsAre("1 worker not needed any more: 1 worker at work"));
  EXPECT_FALSE(job.end);
  EXPECT_THAT(job.finish(1), ElementsAre("all workers finished"));
  ASSERT_TRUE(job.end);
  EXPECT_TRUE(job.end->ok);
}

TEST(Membership, ADeathWhileOthersHaveFinished) {
  Job job({.least = 2, .most = 2});
  job.begin();
  job.finish(0);
  EXPECT_THAT(job.die(1), ElementsAre(HasSubstr("waiting; a replacement starts")));
  EXPECT_THAT(job.ready(), ElementsAre(HasSubstr("going on with 1 worker, 1 of them new")));
  EXPECT_THAT(job.finish(2), ElementsAre("all workers finished"));
}

TEST(Membership, NoRoom) {
  Job job({.least = 2, .most = 2, .wait_patience = 5s}, 1, 2);
  job.begin();
  EXPECT_THAT(job.die(0), ElementsAre(HasSubstr("1 worker left and at least 2 needed, but no node "
                                                "has room for another: waiting"),
                                      HasSubstr("waiting")));
  EXPECT_THAT(job.later(5s), ElementsAre(HasSubstr("for 5 s no node had room for another")));
  EXPECT_TRUE(job.end);
}

TEST(Membership, OldAndDoubledReportsChangeNothing) {
  Job job({.least = 1, .most = 2});
  job.begin();
  const NodeReport old = job.rosters[0].report(job.now);
  job.die(1);
  const std::uint64_t number = job.generation().number;
  for (int i = 0; i < 2; ++i) {
    job.coordinator().take(old, job.now);
    const Decision decision = job.coordinator().decide(job.now);
    EXPECT_THAT(decision.reasons, IsEmpty());
  }
  EXPECT_EQ(job.generation().number, number);
  // An old answer, too: nothing that was done is undone or done again.
  EXPECT_EQ(job.coordinator().assignment(0).start, 3u);
  const NodePlan plan = job.rosters[0].follow({.term = 0,
                                               .acknowledged = 1,
                                               .generation = nullptr,
                                               .over = 0,
                                               .start = 1,
                                               .kill = {},
                                               .end = std::nullopt});
  EXPECT_EQ(plan.publish, nullptr);
  EXPECT_THAT(plan.start, IsEmpty());
  EXPECT_EQ(plan.over, 1u);
}

TEST(Membership, NodesAreLostAndTheirWorkersReplacedElsewhere) {
  Job job({.least = 1, .most = 4, .node_timeout = 5s}, 2);
  job.begin();
  Roster silent = std::move(job.rosters[1]);
  job.rosters.pop_back();
  job.later(4s);
  EXPECT_EQ(job.generation().number, 0u);
  EXPECT_THAT(
      job.later(1s),
      ElementsAre("rank 2 (pid 100 on node 1) lost: node 1 is silent for 5 s; rank 3 (pid 101 "
                  "on node 1) lost: node 1 is silent for 5 s: going on with 2 workers; 2 "
                  "replacements start (2 of 10 restarts in 60 s)"));
  job.commit();
  EXPECT_THAT(job.ready(), ElementsAre(HasSubstr("2 workers join")));
  // What it reports late of its workers does not bring them back.
  job.coordinator().take(silent.report(job.now), job.now);
  EXPECT_THAT(job.commit(), IsEmpty());
  EXPECT_EQ(job.members().size(), 4u);
}

TEST(Membership, ACoordinatorLearnsFromReports) {
  Job job({.least = 1, .most = 4, .node_timeout = 5s}, 2);
  job.begin();
  job.die(0);
  const JobGeneration before = job.generation();
  job.restart_the_coordinator();
  EXPECT_THAT(job.settle(), IsEmpty());
  job.rosters[0].ended(1, WorkerState::failed, kKilled);
  EXPECT_THAT(job.later(3s), IsEmpty());  // it listens first
  EXPECT_THAT(job.later(2s),
              ElementsAre("rank 0 (pid 1 on node 0) killed by signal 9 (SIGKILL): going on with 2 "
                          "workers; a replacement starts (1 of 10 restarts in 60 s)"));
  EXPECT_GT(job.generation().number, before.number + 1);
  EXPECT_EQ(job.generation().members.size(), 2u);
}

TEST(Membership, WhatAReplacedCoordinatorSaysIsVoid) {
  Roster roster(0, 4);
  Assignment assignment;
  assignment.term = 1;
  assignment.start = 1;
  EXPECT_THAT(roster.follow(assignment).start, ElementsAre(0));
  assignment.term = 0;
  assignment.start = 3;
  assignment.over = 7;
  const NodePlan plan = roster.follow(assignment);
  EXPECT_THAT(plan.start, IsEmpty());
  EXPECT_EQ(plan.over, 0u);
}

TEST(Membership, RefusesImpossibleNumbers) {
  EXPECT_THROW(Coordinator({.least = 0, .most = 1}, {}), ConfigError);
  EXPECT_THROW(Coordinator({.least = 3, .most = 2}, {}), ConfigError);
  EXPECT_THROW(Coordinator({.least = 1, .most = 2, .standby = -1}, {}), ConfigError);
}

// How long a decision takes is printed; the bound only catches what is not linear.
TEST(Membership, TenThousandWorkers) {
  Job job({.least = 5000, .most = 10'000}, 1250);
  job.begin();
  ASSERT_EQ(job.members().size(), 10'000u);
  std::vector<double> took;
  for (std::uint64_t i = 0; i < 8; ++i) {
    job.rosters[7].ended(i, WorkerState::failed, kKilled);
    const NodeReport report = job.rosters[7].report(job.now);
    const auto start = std::chrono::steady_clock::now();
    job.coordinator().take(report, job.now);
    const Decision decision = job.coordinator().decide(job.now);
    const Assignment assignment = job.coordinator().assignment(7);
    took.push_back(seconds(std::chrono::steady_clock::now() - start) * 1000);
    ASSERT_NE(decision.published, nullptr);
  }
  std::sort(took.begin(), took.end());
  std::printf("a death among 10,000 workers: decided in %.2f ms, median; %.2f ms at most\n",
              took[took.size() / 2], took.back());
  EXPECT_LT(took[took.size() / 2], 500);
}

}  // namespace
}  // namespace lockstep
