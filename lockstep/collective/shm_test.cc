// How a group over shared memory fails: every error provoked for real, with processes where a
// process matters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>

#include "lockstep/collective/call.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/process_state.h"
#include "lockstep/collective/ranks_test.h"
#include "lockstep/memory/control_block.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;

// All ranks of a group over one segment, as threads. After a call that fails on every rank, the
// errors by rank.
class Threads {
 public:
  explicit Threads(int size, GroupOptions options = {.timeout = kTestTimeout})
      : segment(make_segment(size, 16 << 20)), groups(size) {
    run_threads(size, [&](int rank) { groups[rank] = make_shm_group(segment, rank, options); });
  }
  std::vector<std::string> errors_of(const std::function<void(Group&)>& call) {
    std::vector<std::string> errors(groups.size());
    run_threads(static_cast<int>(groups.size()),
                [&](int rank) { errors[rank] = error_of([&] { call(*groups[rank]); }); });
    return errors;
  }
  std::shared_ptr<Segment> segment;
  std::vector<std::unique_ptr<Group>> groups;
};

// A call of ten numbers that lets each rank differ.
struct TenFloats {
  std::vector<std::byte> memory = std::vector<std::byte>(80);
  std::span<std::byte> bytes{std::span(memory).first(40)};
};

struct Mismatch {
  std::string name;
  std::function<void(Group&, TenFloats&)> usual, other;
  std::string usual_text, other_text;
};

TEST(ShmMismatchTest, EveryRankQuotesBothCalls) {
  const auto sum = [](Group& group, TenFloats& data) {
    group.all_reduce(data.bytes, Dtype::float32, Reduction::sum, {.tag = "a"});
  };
  const std::string sum_text = "all_reduce(float32 × 10, sum, tag 'a')";
  const auto broadcast = [](Group& group, TenFloats& data) {
    group.broadcast(data.bytes, Dtype::float32, 0);
  };
  const std::string broadcast_text = "broadcast(float32 × 10, root 0)";
  const std::vector<Mismatch> mismatches = {
      {"operation", sum, broadcast, sum_text, broadcast_text},
      {"barrier", sum, [](Group& group, TenFloats&) { group.barrier({.tag = "end"}); }, sum_text,
       "barrier(tag 'end')"},
      {"dtype", sum,
       [](Group& group, TenFloats& data) {
         group.all_reduce(data.bytes, Dtype::int32, Reduction::sum);
       },
       sum_text, "all_reduce(int32 × 10, sum)"},
      {"count", sum,
       [](Group& group, TenFloats& data) {
         group.all_reduce(data.bytes.first(36), Dtype::float32, Reduction::sum);
       },
       sum_text, "all_reduce(float32 × 9, sum)"},
      {"reduction", sum,
       [](Group& group, TenFloats& data) {
         group.all_reduce(data.bytes, Dtype::float32, Reduction::max);
       },
       sum_text, "all_reduce(float32 × 10, max)"},
      {"root", broadcast,
       [](Group& group, TenFloats& data) { group.broadcast(data.bytes, Dtype::float32, 1); },
       broadcast_text, "broadcast(float32 × 10, root 1)"},
      {"gather", broadcast,
       [](Group& group, TenFloats& data) {
         std::vector<std::byte> all(120);
         group.all_gather(data.bytes, all, Dtype::float32);
       },
       broadcast_text, "all_gather(float32 × 10)"},
  };
  for (const Mismatch& mismatch : mismatches) {
    Threads threads(3);
    threads.errors_of([](Group& group) { group.barrier(); });
    const auto errors = threads.errors_of([&](Group& group) {
      TenFloats data;
      (group.rank() == 1 ? mismatch.other : mismatch.usual)(group, data);
    });
    for (const std::string& error : errors)
      EXPECT_THAT(error, HasSubstr("operation 2 of generation 0")) << mismatch.name;
    for (const std::string& error : errors)
      EXPECT_THAT(error, HasSubstr("the ranks' calls differ: ranks 0 and 2 called " +
                                   mismatch.usual_text + ", rank 1 called " + mismatch.other_text))
          << mismatch.name;
  }
}

TEST(ShmMismatchTest, LayoutsOfTheTreeAreCompared) {
  Threads threads(2);
  const auto errors = threads.errors_of([](Group& group) {
    const int cut = group.rank() == 0 ? 1 : 2;
    auto slots = group.allocate(64, "slots");
    group.tree_all_reduce(slots, slots.first(4), Dtype::float32, {{{0, cut}, {cut, 3}}, 3});
  });
  for (const std::string& error : errors)
    EXPECT_THAT(error,
                AllOf(HasSubstr("rank 0 called tree_all_reduce(float32 × 1, 3 virtual ranks"),
                      HasSubstr("rank 1 called tree_all_reduce(")));
}

TEST(ShmFailureTest, ALateRankIsNamedWithWhatItDidLast) {
  Threads threads(3);
  threads.errors_of([](Group& group) { group.barrier({.tag = "epoch 1"}); });
  std::atomic<bool> given_up = false;
  const auto errors = threads.errors_of([&](Group& group) {
    if (group.rank() == 0) await_sleeper(*threads.segment, 0);  // until rank 2 is there
    if (group.rank() == 1) given_up.wait(false);                // late: comes when 0 has given up
    std::vector<std::byte> data(40);
    const std::string error = error_of([&] {
      group.all_reduce(data, Dtype::float32, Reduction::sum,
                       {.tag = "layer.weight", .timeout = group.rank() == 0 ? 100ms : 60'000ms});
    });
    given_up = true;
    given_up.notify_all();
    throw Error(error);
  });
  EXPECT_THAT(
      errors[0],
      MatchesRegex("rank 0, operation 2 of generation 0, all_reduce\\(float32 × 10, sum, tag "
                   "'layer.weight'\\): gave up after [0-9.]+ s waiting for rank 1, last seen "
                   "after operation 1, barrier\\(tag 'epoch 1'\\), [0-9.]+ s ago \\(pid " +
                   std::to_string(::getpid()) + ", alive\\)"));
  EXPECT_EQ(errors[1], "rank 0 ended the group: " + errors[0]);
  EXPECT_EQ(errors[2], "rank 0 ended the group: " + errors[0]);
}

TEST(ShmFailureTest, AfterAnErrorTheGroupIsOver) {
  Threads threads(2);
  const auto first = threads.errors_of([](Group& group) {
    if (group.rank() == 0) group.barrier({.timeout = 1ms});
  });
  EXPECT_THAT(first[0], HasSubstr("gave up"));
  const auto second = threads.errors_of([](Group& group) { group.barrier(); });
  EXPECT_EQ(second[0], "this group ended with: " + first[0]);
  EXPECT_EQ(second[1], "rank 0 ended the group: " + first[0]);
  // The segment lives on: the next generation works at once.
  const auto third = threads.errors_of([&](Group& group) {
    auto next = make_shm_group(threads.segment, group.rank(), {.generation = 1, .timeout = 60s});
    next->barrier();
    EXPECT_EQ(next->generation(), 1u);
  });
  EXPECT_THAT(third, ::testing::Each("no error"));
}

TEST(ShmFailureTest, AnAbortFromOutsideWakesEveryWaiter) {
  Threads threads(3);
  Clock::time_point aborted{};
  std::thread agent([&] {
    await_sleeper(*threads.segment, 2);
    aborted = Clock::now();
    threads.segment->abort("worker 2 was killed by signal 9");
  });
  const auto errors = threads.errors_of([](Group& group) {
    if (group.rank() != 2) group.barrier({.tag = "end"});
  });
  agent.join();
  EXPECT_LT(Clock::now() - aborted, 1s);
  for (const int rank : {0, 1})
    EXPECT_EQ(errors[rank], "rank " + std::to_string(rank) +
                                ", operation 1 of generation 0, barrier(tag 'end'): the job was "
                                "aborted: worker 2 was killed by signal 9");
  // Also a rank that would not have had to wait.
  EXPECT_THAT(error_of([&] { threads.groups[2]->barrier(); }), HasSubstr("the job was aborted"));
}

TEST(ShmFailureTest, ARankThatLeavesIsNamedAtOnce) {
  Threads threads(2);
  const auto errors = threads.errors_of([&](Group& group) {
    if (group.rank() == 1)
      threads.groups[1].reset();
    else
      group.barrier();
  });
  EXPECT_THAT(errors[0],
              HasSubstr("rank 1 has left the group, last seen after operation 0, join()"));
}

TEST(ShmJoinTest, TheDeadlineNamesWhoDidNotCome) {
  auto segment = make_segment(3, 16 << 20);
  EXPECT_THAT(error_of([&] { make_shm_group(segment, 0, {.timeout = 20ms}); }),
              AllOf(HasSubstr("join(): gave up after"),
                    HasSubstr("waiting for rank 1, which has never joined; rank 2, which has never "
                              "joined")));
}

TEST(ShmJoinTest, AnotherGenerationIsRefusedByName) {
  auto segment = make_segment(2, 16 << 20);
  std::vector<std::string> errors(2);
  run_threads(2, [&](int rank) {
    while (rank == 1 && segment->control(0).joined.load() == 0) std::this_thread::yield();
    errors[rank] = error_of([&] {
      make_shm_group(segment, rank,
                     {.generation = rank == 0 ? 4u : 5u, .timeout = rank == 0 ? 60'000ms : 200ms});
    });
  });
  EXPECT_THAT(errors[0],
              HasSubstr("rank 1 is in generation 5 already, this group is of generation 4"));
  EXPECT_THAT(errors[1], HasSubstr("waiting for rank 0, which is in generation 4 (pid"));
}

TEST(ShmJoinTest, NobodyJoinsAGenerationTwice) {
  Threads threads(2, {.generation = 3});
  for (const std::uint64_t generation : {2, 3})
    EXPECT_THAT(error_of([&] { make_shm_group(threads.segment, 0, {.generation = generation}); }),
                HasSubstr("rank 0 cannot join generation " + std::to_string(generation) +
                          ": it already took part in generation 3"));
  EXPECT_THAT(error_of([&] { make_shm_group(threads.segment, 2, {}); }),
              HasSubstr("rank 2 in a group of 2 ranks"));
  EXPECT_THAT(error_of([&] { make_shm_group(threads.segment, 0, {.generation = 1 << 16}); }),
              HasSubstr("too large"));
}

TEST(ShmJoinTest, ADestroyedGroupGivesItsMemoryBack) {
  Threads threads(2);
  threads.errors_of([](Group& group) { std::ignore = group.allocate(100'000, "memory"); });
  EXPECT_GT(threads.segment->control(0).arena_used.load(), 100'000u);
  threads.groups.clear();
  EXPECT_EQ(threads.segment->control(0).arena_used.load(), 0u);
  EXPECT_EQ(threads.segment->control(1).arena_used.load(), 0u);
}

TEST(ShmJoinTest, LackOfRoomIsAnErrorThatOthersHearOf) {
  Threads threads(2);
  const auto errors = threads.errors_of([&](Group& group) {
    if (group.rank() == 1) group.barrier();
    if (group.rank() == 0) {
      const std::string error = error_of([&] { group.allocate(1 << 30, "the gradients"); });
      threads.groups[0].reset();
      throw Error(error);
    }
  });
  EXPECT_THAT(errors[0], StartsWith("no room for the gradients in the arena of rank 0"));
  EXPECT_THAT(errors[1], HasSubstr("rank 0 has left the group"));
}

// Rank 1 is played by hand: it writes whatever it likes into its control block.
TEST(ShmHostileTest, PlacesThatARankNamesAreChecked) {
  for (const std::uint64_t place : {std::uint64_t{0}, std::uint64_t{64}, ~std::uint64_t{0} - 63,
                                    std::uint64_t{1} << 40, std::uint64_t{2 << 20} + 1}) {
    auto segment = make_segment(2, 16 << 20);
    auto& block = segment->control(1);
    const CallWords words = pack({.operation = Operation::join, .place = place});
    for (std::size_t i = words.size(); i-- > 0;) block.joins[0].words[i].store(words[i]);
    EXPECT_THAT(error_of([&] { make_shm_group(segment, 0, {.timeout = 60s}); }),
                AllOf(HasSubstr("join()"),
                      ::testing::AnyOf(HasSubstr("outside its arena"), HasSubstr("misaligned"))))
        << place;
  }
}

TEST(ShmHostileTest, NonsenseInAControlBlockIsShownNotTrusted) {
  auto segment = make_segment(2, 16 << 20);
  auto& block = segment->control(1);
  for (auto& line : block.calls)
    for (std::size_t i = 1; i < line.words.size(); ++i) line.words[i].store(~std::uint64_t{0});
  block.joined.store(1);
  block.pid.store(-1);
  segment->failed_word().store(1 << 16 | 0xffff);  // a rank that does not exist
  EXPECT_THAT(error_of([&] { make_shm_group(segment, 0, {.timeout = 60s}); }),
              HasSubstr("rank 1 died"));
  Call nonsense = unpack(pack({.operation = static_cast<Operation>(99),
                               .dtype = static_cast<Dtype>(99),
                               .reduction = static_cast<Reduction>(99),
                               .count = 3}));
  nonsense.tag = "a\nb";
  EXPECT_EQ(describe(nonsense), "unknown operation(unknown dtype × 3, tag 'a?b')");
}

// What rank 1 does in the tests of processes: joins, finishes a barrier, and then never calls.
void stall(const std::shared_ptr<Segment>& segment, const Processes::Report& report) {
  auto group = make_shm_group(segment, 1, {.timeout = kTestTimeout});
  group->barrier({.tag = "start"});
  report("ready");
  for (;;) ::pause();
}

class ShmProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kThreadSanitizer) GTEST_SKIP() << "forked ranks; see ranks_test.h";
  }
  // Rank 0: reports the error of an all_reduce that rank 1 never joins.
  void start_rank_0(Clock::duration timeout, ProcessState rank_1 = ProcessState::running) {
    processes_.start(0, [=](const auto& segment, const auto& report) {
      auto group = make_shm_group(segment, 0, {.timeout = kTestTimeout});
      group->barrier({.tag = "start"});
      std::vector<std::byte> data(40);
      report("ready");
      while (process_state(segment->control(1).pid.load(), 0) != rank_1) std::this_thread::yield();
      report(error_of([&] {
        group->all_reduce(data, Dtype::float32, Reduction::sum,
                          {.tag = "gradients", .timeout = timeout});
      }));
    });
  }
  std::shared_ptr<Segment> segment_ = make_segment(2, 16 << 20);
  Processes processes_{segment_};
};

TEST_F(ShmProcessTest, AKilledRankIsNamedLongBeforeTheDeadline) {
  processes_.start(1, stall);
  start_rank_0(kTestTimeout);
  ASSERT_EQ(processes_.line(0), "ready");
  ASSERT_EQ(processes_.line(1), "ready");
  await_sleeper(*segment_, 1);
  const auto killed = Clock::now();
  processes_.signal(1, SIGKILL);
  const std::string error = processes_.line(0);
  EXPECT_LT(Clock::now() - killed, kTestTimeout / 2);
  EXPECT_THAT(error, MatchesRegex("rank 0, operation 2 of generation 0, all_reduce\\(float32 × 10, "
                                  "sum, tag 'gradients'\\): rank 1 died, last seen after operation "
                                  "1, barrier\\(tag 'start'\\), [0-9.]* s ago \\(pid " +
                                  std::to_string(processes_.pid(1)) + ", dead\\)"));
  EXPECT_EQ(processes_.join(0), 0);
}

TEST_F(ShmProcessTest, AStoppedRankIsNamedAsStopped) {
  processes_.start(1, stall);
  start_rank_0(100ms, ProcessState::stopped);
  ASSERT_EQ(processes_.line(1), "ready");
  processes_.signal(1, SIGSTOP);
  ASSERT_EQ(processes_.line(0), "ready");
  const std::string error = processes_.line(0);
  EXPECT_THAT(error, HasSubstr("gave up after "));
  EXPECT_THAT(error, HasSubstr("rank 1, last seen after operation 1, barrier(tag 'start')"));
  EXPECT_THAT(error,
              HasSubstr("(pid " + std::to_string(processes_.pid(1)) + ", stopped by a signal)"));
}

TEST_F(ShmProcessTest, AbortReachesOtherProcesses) {
  processes_.start(1, stall);
  start_rank_0(kTestTimeout);
  ASSERT_EQ(processes_.line(0), "ready");
  await_sleeper(*segment_, 1);
  const auto aborted = Clock::now();
  segment_->abort("interrupted by Ctrl-C");
  EXPECT_THAT(processes_.line(0), HasSubstr("the job was aborted: interrupted by Ctrl-C"));
  EXPECT_LT(Clock::now() - aborted, 5s);
}

TEST_F(ShmProcessTest, AKillInTheMiddleOfOperationsEndsTheOthers) {
  Processes processes(make_segment(3, 64 << 20));
  for (int rank = 0; rank < 3; ++rank)
    processes.start(rank, [rank](const auto& segment, const auto& report) {
      auto group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
      std::vector<std::byte> data(5 << 20);  // two chunks: most of the time is spent inside
      report(error_of([&] {
        for (int i = 0;; ++i) {
          group->all_reduce(data, Dtype::float32, Reduction::sum);
          if (i == 3) report("ready");
        }
      }));
    });
  for (int rank = 0; rank < 3; ++rank) ASSERT_EQ(processes.line(rank), "ready");
  processes.signal(2, SIGKILL);
  for (const int rank : {0, 1})
    EXPECT_THAT(processes.line(rank),
                AllOf(HasSubstr("rank 2 died, last seen "), HasSubstr("dead")));
}

TEST_F(ShmProcessTest, ProcessStates) {
  EXPECT_EQ(process_state(::getpid(), process_start_time(::getpid())), ProcessState::running);
  EXPECT_EQ(process_state(::getpid(), process_start_time(::getpid()) + 1), ProcessState::dead);
  for (const int pid : {0, -1, 1 << 30}) EXPECT_EQ(process_state(pid, 0), ProcessState::dead);
  processes_.start(1, [](const auto&, const auto&) {});
  EXPECT_EQ(processes_.line(1), "");
  siginfo_t info{};
  ASSERT_EQ(::waitid(P_PID, processes_.pid(1), &info, WEXITED | WNOWAIT), 0);
  EXPECT_EQ(process_state(processes_.pid(1), 0), ProcessState::dead);  // not yet reaped
}

}  // namespace
}  // namespace lockstep
