// How messages, uneven exchanges and sub-groups over shared memory fail.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <barrier>

#include "lockstep/collective/ranks_test.h"
#include "lockstep/memory/control_block.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::StartsWith;

using Errors = std::vector<std::string>;

// The error of body(group) by rank.
Errors errors_of(const std::shared_ptr<Segment>& segment, std::function<void(Group&)> body) {
  Errors errors(segment->seats());
  std::barrier over(segment->seats());  // nobody leaves while another is still in a call
  run_threads(segment->seats(), [&](int rank) {
    auto group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    errors[rank] = error_of([&] { body(*group); });
    over.arrive_and_wait();
  });
  return errors;
}
Errors errors_of(int size, std::function<void(Group&)> body) {
  return errors_of(make_segment(size, 16 << 20), std::move(body));
}

struct Data {
  std::vector<std::byte> memory = std::vector<std::byte>(40);
  std::span<std::byte> bytes{memory};
};

TEST(ShmMessageTest, TwoThatDisagreeQuoteBothCalls) {
  const auto errors = errors_of(3, [](Group& group) {
    Data data;
    group.barrier();
    if (group.rank() == 0) group.send(data.bytes, Dtype::float32, 2, {.tag = "activations"});
    if (group.rank() == 2) group.recv(data.bytes.first(36), Dtype::float32, 0);
    if (group.rank() == 1) group.barrier();
  });
  const std::string both =
      "the calls of two ranks differ: rank 0 called send(float32 × 10, to rank 2, tag "
      "'activations'), rank 2 called recv(float32 × 9, from rank 0)";
  EXPECT_THAT(errors, Each(HasSubstr(both)));  // rank 1 too: the group is over
}

TEST(ShmMessageTest, TwoThatBothSendFirstAreTold) {
  const auto errors = errors_of(2, [](Group& group) {
    Data data;
    group.send(data.bytes, Dtype::float32, 1 - group.rank());
  });
  EXPECT_THAT(errors, Each(HasSubstr("rank 0 called send(float32 × 10, to rank 1), rank 1 called "
                                     "send(float32 × 10, to rank 0)")));
}

TEST(ShmMessageTest, TheDeadlineNamesTheLateRank) {
  const auto errors = errors_of(3, [](Group& group) {
    Data data;
    group.barrier({.tag = "epoch 1"});
    if (group.rank() == 0)
      group.recv(data.bytes, Dtype::int64, 2, {.tag = "gradient", .timeout = 50ms});
  });
  EXPECT_THAT(errors[0], AllOf(StartsWith("rank 0, message 0 of generation 0, recv(int64 × 5, from "
                                          "rank 2, tag 'gradient'): gave up after "),
                               HasSubstr("waiting for rank 2, last seen after operation 1, "
                                         "barrier(tag 'epoch 1')"),
                               HasSubstr("alive)")));
  EXPECT_EQ(errors[1], "no error");
}

TEST(ShmMessageTest, ARankThatLeavesIsNamed) {
  auto segment = make_segment(2, 16 << 20);
  std::string error;
  run_threads(2, [&](int rank) {
    auto group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    Data data;
    if (rank == 0) error = error_of([&] { group->send(data.bytes, Dtype::float32, 1); });
  });
  EXPECT_THAT(error, HasSubstr("rank 1 has left the group, last seen after operation 0, join()"));
}

class ShmMessageProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kThreadSanitizer) GTEST_SKIP() << "it needs processes";
    processes_.start(0, [](const auto& segment, const auto& report) {
      auto group = make_shm_group(segment, 0, {.timeout = 500ms});
      Data data;
      report("ready");
      report(error_of([&] { group->recv(data.bytes, Dtype::float32, 1); }));
    });
    processes_.start(1, [](const auto& segment, const auto& report) {
      auto group = make_shm_group(segment, 1, {.timeout = kTestTimeout});
      report("ready");
      for (;;) ::pause();
    });
  }
  void signal_when_ready(int number) {
    for (const int rank : {1, 0}) {
      ASSERT_EQ(processes_.line(rank), "ready");
      if (rank == 1) processes_.signal(1, number);
    }
  }
  Processes processes_{make_segment(2, 16 << 20)};
};

TEST_F(ShmMessageProcessTest, AKilledRankIsNamed) {
  signal_when_ready(SIGKILL);
  EXPECT_THAT(processes_.line(0),
              AllOf(HasSubstr("rank 1 died, last seen after operation 0"), HasSubstr("dead)")));
}

TEST_F(ShmMessageProcessTest, AStoppedRankIsNamed) {
  signal_when_ready(SIGSTOP);
  EXPECT_THAT(processes_.line(0),
              AllOf(HasSubstr("gave up after"), HasSubstr("stopped by a signal)")));
}

TEST(ShmExchangeTest, CountsThatDisagreeEndOnEveryRank) {
  const auto errors = errors_of(3, [](Group& group) {
    std::vector<std::byte> input(3 * 4), output(3 * 4 + 4);
    const std::vector<std::uint64_t> sent = {1, 1, 1};
    std::vector<std::uint64_t> received = {1, 1, 1};
    if (group.rank() == 2) received[1] = 2;
    group.all_to_all_uneven(input, sent, std::span(output).first(group.rank() == 2 ? 16 : 12),
                            received, Dtype::float32, {.tag = "tokens"});
  });
  EXPECT_THAT(errors, Each(HasSubstr("all_to_all_uneven(float32, 12 bytes, tag 'tokens'): rank 1 "
                                     "sends 1 elements to rank 2, which expects 2")));
}

TEST(ShmExchangeTest, CountsOfAllGatherAreCompared) {
  const auto errors = errors_of(2, [](Group& group) {
    std::vector<std::byte> output(4);
    const std::uint64_t own = group.rank() == 0 ? 1 : 2;
    const std::vector<std::uint64_t> counts =
        group.rank() == 0 ? std::vector<std::uint64_t>{own, 3} : std::vector<std::uint64_t>{2, own};
    std::vector<std::byte> input(own);
    group.all_gather_uneven(input, output, counts, Dtype::int8);
  });
  EXPECT_THAT(errors, Each(AllOf(HasSubstr("rank 0 called all_gather_uneven(int8 × 4, counts"),
                                 HasSubstr("rank 1 called all_gather_uneven(int8 × 4, counts"))));
}

TEST(ShmSubGroupTest, ItFailsAloneAndSaysWhoItIs) {
  const auto errors = errors_of(4, [](Group& group) {
    auto half = group.split(group.rank() / 2, 0);
    Data data;
    std::string error = "no error";
    if (group.rank() == 2) error = error_of([&] { half->barrier({.tag = "x"}); });
    if (group.rank() == 3)
      error = error_of([&] { half->all_reduce(data.bytes, Dtype::float32, Reduction::sum); });
    if (group.rank() < 2) half->barrier();
    group.barrier();  // the others, and the group of all, live on
    if (error != "no error") throw Error(error);
  });
  EXPECT_EQ(errors[0], "no error");
  for (const int rank : {2, 3})
    EXPECT_THAT(errors[rank],
                AllOf(HasSubstr("ranks 2,3: rank "),
                      HasSubstr("the ranks' calls differ: rank 0 called barrier(tag 'x'), rank 1 "
                                "called all_reduce(float32 × 10, sum)")));
}

TEST(ShmSubGroupTest, AnAbortWakesItsWaiters) {
  auto segment = make_segment(3, 16 << 20);
  std::atomic<bool> in_pair = false;
  std::jthread agent([&] {
    in_pair.wait(false);
    await_sleeper(*segment, 2);
    segment->abort("interrupted");
  });
  const auto errors = errors_of(segment, [&](Group& group) {
    auto pair = group.split(group.rank() == 0 ? -1 : 1, 0);
    // Rank 2 stays in the pair, but does not come.
    while (group.rank() != 1 && segment->abort_word().load() == 0) std::this_thread::yield();
    if (group.rank() != 1) return;
    in_pair = true;
    in_pair.notify_all();
    pair->barrier({.tag = "pair"});
  });
  EXPECT_THAT(
      errors[1],
      AllOf(StartsWith("ranks 1,2: rank 0, operation 1 of generation 0, barrier(tag 'pair')"),
            HasSubstr("the job was aborted: interrupted")));
}

TEST(ShmSubGroupTest, ItOutlivesItsParent) {
  auto segment = make_segment(2, 16 << 20);
  run_threads(2, [&](int rank) {
    auto group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    auto all = group->split(0, -rank);
    group.reset();
    std::int32_t value = rank + 1;
    for (int i = 0; i < 100; ++i)
      all->all_reduce(std::as_writable_bytes(std::span(&value, 1)), Dtype::int32, Reduction::max);
    EXPECT_EQ(value, 2);
  });
}

}  // namespace
}  // namespace lockstep
