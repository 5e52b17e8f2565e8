#include "lockstep/cluster/members.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lockstep/memory/control_block.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;

struct Job {
  explicit Job(const Policy& policy)
      : coordinator(policy, now),
        members({.welcome = {.least = policy.least, .most = policy.most},
                 .self = {.workers = policy.most},
                 .hang_timeout = 1s},
                segment, [](const nlohmann::json&) {}) {
    for (const int seat : decide().start) {
      workers.push_back(members.start(seat));
      members.runs(workers.back(), 1 << 30, now);  // no process that there can be
      members.says(workers.back(), {{"event", "join"}}, now);
    }
    decide();
    members.says(workers[0], {{"event", "first_step"}}, now);
  }
  NodeMembers::Steps decide() {
    coordinator.take(members.report(now), now);
    coordinator.decide(now);
    return members.follow(coordinator.assignment(0), now);
  }
  std::vector<std::uint64_t> hung_within(Clock::duration time) {
    std::vector<std::uint64_t> hung;
    for (const auto end = now + time; now < end; now += 100ms) {
      for (const auto& one : members.look_for_hung(now)) hung.push_back(one.worker);
      decide();
    }
    return hung;
  }

  Clock::time_point now{1000s};
  std::shared_ptr<Segment> segment = Segment::create({.seats = 4, .arena_bytes = 1 << 20});
  Coordinator coordinator;
  NodeMembers members;
  std::vector<std::uint64_t> workers;
};

// Who is told to leave hangs before it could: it is to be killed, and not those who wait for it.
TEST(NodeMembers, WhoIsToLeaveAndHangsIsFound) {
  Job job({.least = 1, .most = 2});
  job.coordinator.scale(1);
  job.decide();
  ASSERT_FALSE(job.members.is_member(job.workers[1]));
  job.segment->control(0).calls[0].words[0] = 5;  // waits there for who is at 4
  job.segment->control(1).calls[0].words[0] = 4;
  EXPECT_THAT(job.hung_within(3s), testing::ElementsAre(job.workers[1]));
}

// Who is left waits as long as the dying and their replacements take.
TEST(NodeMembers, WhoWaitsForAReplacementDoesNotHang) {
  Job job({.least = 2, .most = 2});
  job.segment->control(0).calls[0].words[0] = 5;
  job.segment->control(1).calls[0].words[0] = 4;
  EXPECT_THAT(job.hung_within(3s), testing::ElementsAre(job.workers[1]));
  job.members.ended(job.workers[1], {.signal = 9, .cause = "killed"}, job.now);
  EXPECT_THAT(job.decide().start, testing::ElementsAre(2));
  EXPECT_THAT(job.hung_within(3s), testing::IsEmpty());
}

TEST(Roster, ADeadMembersSeatIsFreeOnceTheNextGenerationHasEntered) {
  Roster roster(0, 2);
  const auto follow = [&](std::uint64_t generation, std::uint64_t worker, int seat) {
    auto next = std::make_shared<JobGeneration>();
    next->number = generation;
    next->members = {{0, seat, worker}};
    Assignment assignment;
    assignment.acknowledged = roster.report({}).version;
    assignment.generation = next;
    return roster.follow(assignment);
  };
  const std::uint64_t first = roster.started(0, 1), second = roster.started(1, 2);
  follow(0, first, 0);
  roster.ended(first, WorkerState::failed, "killed");
  EXPECT_TRUE(follow(1, second, 1).reset.empty());  // a step that it decided is to be finished
  roster.entered(0);                                // it was: of the one before
  EXPECT_TRUE(follow(1, second, 1).reset.empty());
  roster.entered(1);
  EXPECT_EQ(follow(1, second, 1).reset, std::vector{0});
}

}  // namespace
}  // namespace lockstep
