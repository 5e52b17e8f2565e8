// docs/errors.md shows one sample of each error: each is provoked here, and its sample must have
// its shape. And how soon an abort from outside is heard.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <condition_variable>
#include <filesystem>
#include <regex>

#include "lockstep/collective/process_state.h"
#include "lockstep/collective/ranks_test.h"
#include "lockstep/memory/available_memory.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/flight_recorder.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;

// Numbers are the sample's own.
std::string shape_of(const std::string& text) {
  return std::regex_replace(text, std::regex("[0-9]+([.][0-9]+)?"), "N");
}

void expect_sample(const std::string& error) {
  static const std::string samples = shape_of(read_text_file(
      std::filesystem::path(__FILE__).parent_path() / ".." / ".." / "docs" / "errors.md"));
  EXPECT_NE(samples.find("\n" + shape_of(error) + "\n"), std::string::npos)
      << "docs/errors.md has no sample of\n"
      << error;
}

using Calls = std::function<void(Group&, std::span<std::byte>)>;

// Two ranks as threads that call differently, after one barrier; rank 0's error.
std::string error_of_two(const Calls& rank_0, const Calls& rank_1) {
  const auto segment = make_segment(2, 16 << 20);
  std::string error;
  run_threads(2, [&](int rank) {
    auto group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    group->barrier({.tag = "start"});
    std::vector<std::byte> data(80);
    const std::string mine =
        error_of([&] { (rank == 0 ? rank_0 : rank_1)(*group, std::span(data).first(40)); });
    if (rank == 0) error = mine;
  });
  return error;
}

TEST(ErrorSamplesTest, DifferentCalls) {
  const auto sum = [](Dtype dtype, std::size_t bytes, const char* tag) {
    return [=](Group& group, std::span<std::byte> data) {
      group.all_reduce(data.first(bytes), dtype, Reduction::sum, {.tag = tag});
    };
  };
  const auto broadcast = [](int root) {
    return [=](Group& group, std::span<std::byte> data) {
      group.broadcast(data, Dtype::float32, root, {.tag = "weights"});
    };
  };
  const Calls usual = sum(Dtype::float32, 40, "gradients");
  expect_sample(error_of_two(usual, broadcast(0)));
  expect_sample(error_of_two(usual, sum(Dtype::int32, 40, "gradients")));
  expect_sample(error_of_two(usual, sum(Dtype::float32, 36, "gradients")));
  expect_sample(error_of_two(broadcast(0), broadcast(1)));
  // Order: the same calls, one rank the other way round.
  expect_sample(error_of_two(
      [&](Group& group, std::span<std::byte> data) {
        usual(group, data);
        group.barrier({.tag = "end"});
      },
      [&](Group& group, std::span<std::byte> data) {
        group.barrier({.tag = "end"});
        usual(group, data);
      }));
}

TEST(ErrorSamplesTest, ARankThatLeavesAndTheGroupAfterwards) {
  const auto segment = make_segment(2, 16 << 20);
  run_threads(2, [&](int rank) {
    auto group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    if (rank == 1) return;
    expect_sample(error_of([&] { group->barrier({.tag = "end"}); }));
    expect_sample(error_of([&] { group->barrier({.tag = "end"}); }));
  });
}

TEST(ErrorSamplesTest, ARankThatNeverJoins) {
  expect_sample(error_of([] { make_shm_group(make_segment(2, 16 << 20), 0, {.timeout = 20ms}); }));
}

TEST(ErrorSamplesTest, LackOfMemory) {
  expect_sample(error_of([] {
    require_memory(3'000'000'000, {1'000'000'000, "this machine"}, "the gradients");
  }));
  expect_sample(error_of([] { make_segment(1, 16 << 20)->allocate(0, 1 << 30, "the gradients"); }));
}

TEST(ErrorSamplesTest, ALimitOfTheProcess) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit tight{1 << 30, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  const std::string error = error_of([] { make_segment(3, 8ULL << 30); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  expect_sample(error);
}

// What rank 0 says of a rank 1 that becomes `state` after a barrier, by `signal` or not at all.
std::string error_about(int signal, ProcessState state) {
  const auto segment = make_segment(2, 16 << 20);
  Processes processes(segment);
  processes.start(1, [](const auto& shared, const auto& report) {
    auto group = make_shm_group(shared, 1, {.timeout = kTestTimeout});
    group->barrier({.tag = "start"});
    report("ready");
    for (;;) ::pause();
  });
  const auto timeout = state == ProcessState::dead ? Clock::duration(kTestTimeout) : 100ms;
  processes.start(0, [=](const auto& shared, const auto& report) {
    auto group = make_shm_group(shared, 0, {.timeout = kTestTimeout});
    group->barrier({.tag = "start"});
    while (process_state(shared->control(1).pid.load(), 0) != state) std::this_thread::yield();
    std::vector<std::byte> data(40);
    report(error_of([&] {
      group->all_reduce(data, Dtype::float32, Reduction::sum,
                        {.tag = "gradients", .timeout = timeout});
    }));
  });
  EXPECT_EQ(processes.line(1), "ready");
  if (signal != 0) processes.signal(1, signal);
  return processes.line(0);
}

TEST(ErrorSamplesTest, KilledStoppedAndLateProcesses) {
  if (kThreadSanitizer) GTEST_SKIP() << "forked ranks; see ranks_test.h";
  expect_sample(error_about(SIGKILL, ProcessState::dead));
  expect_sample(error_about(SIGSTOP, ProcessState::stopped));
  expect_sample(error_about(0, ProcessState::running));
}

// From the abort to the moment when both waiters have their error.
Clock::duration time_of_an_abort() {
  const auto segment = make_segment(3, 8 << 20);
  std::array<Clock::time_point, 3> heard;
  Clock::time_point aborted;
  run_threads(3, [&](int rank) {
    auto group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    if (rank == 2) {
      const Deadline deadline = Deadline::after(kTestTimeout);
      const auto in_barrier = [&](int other) { return segment->recorder(other).opened.load() > 1; };
      while (!(in_barrier(0) && in_barrier(1)) && !deadline.expired()) std::this_thread::yield();
      await_sleeper(*segment, 2);
      aborted = Clock::now();
      return segment->abort("worker 2 was killed by signal 9");
    }
    const std::string error = error_of([&] { group->barrier({.tag = "end"}); });
    heard[rank] = Clock::now();
    if (rank == 0) expect_sample(error);
  });
  return std::max(heard[0], heard[1]) - aborted;
}

// How long this machine, as busy as it is now, takes to wake a thread.
Clock::duration time_of_a_wake_up() {
  std::mutex mutex;
  std::condition_variable condition;
  bool waits = false, wake = false;
  Clock::time_point woken;
  std::jthread waiter([&] {
    std::unique_lock lock(mutex);
    waits = true;
    condition.notify_all();
    condition.wait(lock, [&] { return wake; });
    woken = Clock::now();
  });
  std::unique_lock lock(mutex);
  condition.wait(lock, [&] { return waits; });
  const auto start = Clock::now();
  wake = true;
  condition.notify_all();
  lock.unlock();
  waiter.join();
  return woken - start;
}

// The median of many, because a single one may meet a busy core; and against what a bare wake-up
// costs at the same time, because all may. An abort that went unheard would take a slice, 50 ms.
TEST(ErrorSamplesTest, AnAbortIsHeardWithinTenMilliseconds) {
  std::vector<Clock::duration> aborts, wake_ups;
  for (int i = 0; i < 51; ++i) {
    aborts.push_back(time_of_an_abort());
    wake_ups.push_back(time_of_a_wake_up());
  }
  const auto median = [](auto& times) {
    std::ranges::nth_element(times, times.begin() + 25);
    return times[25];
  };
  EXPECT_LE(median(aborts), 10ms + 5 * median(wake_ups)) << seconds(median(aborts)) * 1e3 << " ms";
  RecordProperty("median_us", static_cast<int>(seconds(median(aborts)) * 1e6));
}

}  // namespace
}  // namespace lockstep
