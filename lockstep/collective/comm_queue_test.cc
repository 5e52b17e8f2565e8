#include "lockstep/collective/comm_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <semaphore>

#include "lockstep/collective/ranks_test.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using testing::HasSubstr;

CommQueue::Call sum_of(std::vector<float>& data, const char* tag) {
  return [&data, tag](Group& group) {
    group.all_reduce(std::as_writable_bytes(std::span(data)), Dtype::float32, Reduction::sum,
                     {.tag = tag});
  };
}

void run_group(int ranks, const std::function<void(Group&)>& body) {
  const auto segment = make_segment(ranks, 16 << 20);
  run_threads(ranks,
              [&](int rank) { body(*make_shm_group(segment, rank, {.timeout = kTestTimeout})); });
}

TEST(CommQueueTest, CallsRunInOrderOnOneOtherThread) {
  run_group(3, [](Group& group) {
    CommQueue queue(group);
    std::vector<std::vector<float>> data;
    for (int i = 0; i < 20; ++i) data.emplace_back(1000, group.rank() + i);
    std::vector<int> order;
    std::vector<std::thread::id> threads;
    for (int i = 0; i < 20; ++i) {
      queue.submit(sum_of(data[i], "data"));
      queue.submit([&, i](Group&) {
        order.push_back(i);
        threads.push_back(std::this_thread::get_id());
      });
    }
    queue.wait();
    for (int i = 0; i < 20; ++i) {
      EXPECT_EQ(data[i], std::vector<float>(1000, 3 * i + 3));
      EXPECT_EQ(order[i], i);
      EXPECT_EQ(threads[i], threads[0]);
    }
    EXPECT_NE(threads[0], std::this_thread::get_id());
    group.barrier();  // the owner's again
  });
}

TEST(CommQueueTest, ItsThreadTakesShortTurns) {
  const auto turn_ns = [] {
    std::uint64_t attributes[6] = {};  // the kernel's sched_attr
    EXPECT_EQ(::syscall(SYS_sched_getattr, 0, attributes, sizeof attributes, 0), 0);
    return attributes[3];
  };
  if (turn_ns() == 0) GTEST_SKIP() << "this kernel has no length of turns of a thread's own";
  const auto group = make_solo_group();
  CommQueue queue(*group);
  std::uint64_t of_queue = 0;
  queue.submit([&](Group&) { of_queue = turn_ns(); });
  queue.wait();
  EXPECT_LT(of_queue, turn_ns());
}

// Each rank's call waits for what its owner does after submitting it. A submit() that waited would
// stay there for good.
TEST(CommQueueTest, TheOwnerGoesOnWhileCallsRun) {
  run_group(2, [](Group& group) {
    CommQueue queue(group);
    std::vector<float> first(10, 1), second(10, 2);
    std::binary_semaphore computed(0), begun(0);
    queue.submit([&](Group& slow) {
      begun.release();
      EXPECT_TRUE(computed.try_acquire_for(kTestTimeout));
      sum_of(first, "slow")(slow);
    });
    EXPECT_TRUE(begun.try_acquire_for(kTestTimeout));
    queue.submit(sum_of(second, "second"));
    EXPECT_EQ(first[0], 1);
    EXPECT_EQ(queue.statistics().exposed, 0ns);
    computed.release();
    queue.wait();
    EXPECT_EQ(first[0], 2);
    EXPECT_EQ(second[0], 4);
    EXPECT_GT(queue.statistics().busy, 0ns);
    EXPECT_GT(queue.statistics().exposed, 0ns);
  });
}

TEST(CommQueueTest, AWaitThatLastsIsRecorded) {
  const auto segment = make_segment(1, 1 << 20);
  const auto group = make_solo_group({.generation = 7});
  CommQueue queue(*group, &segment->recorder(0));
  std::binary_semaphore go(0);
  queue.submit([&](Group&) { EXPECT_TRUE(go.try_acquire_for(kTestTimeout)); });
  EXPECT_THROW(queue.wait(Deadline::after(1ms)), CommError);
  go.release();
  queue.wait();
  const auto records = recorded_operations(*segment, 0);
  ASSERT_GE(records.size(), 1u);
  EXPECT_EQ(records[0].group, "exposed");
  EXPECT_EQ(records[0].name(), "wait");
  EXPECT_EQ(records[0].call.generation, 7u);
  EXPECT_EQ(records[0].state, OperationState::done);
  EXPECT_GE(records[0].waited, 1ms);
}

TEST(CommQueueTest, AFailedCollectiveEndsTheQueue) {
  run_group(2, [](Group& group) {
    CommQueue queue(group);
    std::vector<float> good(10), bad(group.rank() == 0 ? 10 : 9), never(10);
    queue.submit(sum_of(good, "good"));
    queue.submit(sum_of(bad, "of different length"));
    std::atomic<bool> ran = false;
    queue.submit([&](Group&) { ran = true; });
    const std::string error = error_of([&] { queue.wait(); });
    EXPECT_THAT(error, HasSubstr("'of different length'"));
    queue.submit([&](Group&) { ran = true; });
    EXPECT_EQ(error_of([&] { queue.wait(); }), error);
    EXPECT_THROW(queue.wait(), CommError);
    EXPECT_FALSE(ran);
  });
}

TEST(CommQueueTest, AnyOtherErrorIsThrownOnce) {
  run_group(2, [](Group& group) {
    CommQueue queue(group);
    std::atomic<bool> ran = false;
    queue.submit([](Group&) { throw ConfigError("the weight is 0"); });
    queue.submit([&](Group&) { ran = true; });
    EXPECT_THROW(queue.wait(), ConfigError);
    EXPECT_FALSE(ran);
    std::vector<float> data(10, 1);
    queue.submit(sum_of(data, "the next one"));
    queue.wait();
    EXPECT_EQ(data[9], 2);
  });
}

TEST(CommQueueTest, AWaitHasADeadline) {
  const auto group = make_solo_group();
  CommQueue queue(*group);
  std::binary_semaphore go(0);
  queue.submit([&](Group&) { EXPECT_TRUE(go.try_acquire_for(kTestTimeout)); });
  queue.submit([](Group&) {});
  EXPECT_EQ(error_of([&] { queue.wait(Deadline::after(1ms)); }),
            "rank 0: 2 queued collectives were not over in time");
  go.release();
  queue.wait(Deadline::after(kTestTimeout));
}

TEST(CommQueueTest, ItsEndWaitsForTheCallThatRunsAndDropsTheOthers) {
  const auto group = make_solo_group();
  std::atomic<bool> ran = false, dropped_ran = false;
  const auto held = std::make_shared<int>();
  std::binary_semaphore begun(0), go(0);
  auto queue = std::make_unique<CommQueue>(*group);
  queue->submit([&](Group&) {
    begun.release();
    EXPECT_TRUE(go.try_acquire_for(kTestTimeout));
    ran = true;
  });
  queue->submit([&, held](Group&) { dropped_ran = true; });
  EXPECT_TRUE(begun.try_acquire_for(kTestTimeout));
  auto end = std::async(std::launch::async, [&] { queue.reset(); });
  const Deadline deadline = Deadline::after(kTestTimeout);
  while (held.use_count() > 1 && !deadline.expired()) std::this_thread::yield();
  EXPECT_FALSE(ran);
  go.release();
  end.get();
  EXPECT_TRUE(ran);
  EXPECT_FALSE(dropped_ran);
}

// What a call holds is free when wait() returns.
TEST(CommQueueTest, ACallIsDestroyedWhenItHasRun) {
  const auto group = make_solo_group();
  CommQueue queue(*group);
  for (int i = 0; i < 100; ++i) {
    const auto held = std::make_shared<int>();
    queue.submit([held](Group&) {});
    queue.wait();
    ASSERT_EQ(held.use_count(), 1);
  }
}

}  // namespace
}  // namespace lockstep
