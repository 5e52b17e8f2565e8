// What one generation leaves to the next, and what a rank that gave up leaves to those that go on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "lockstep/collective/process_state.h"
#include "lockstep/collective/ranks_test.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/flight_recorder.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::vector<std::string> errors_of(int size, const std::function<void(Group&)>& body,
                                   Clock::duration timeout = kTestTimeout) {
  const auto segment = make_segment(size, 64 << 20);
  std::vector<std::string> errors(static_cast<std::size_t>(size));
  run_threads(size, [&](int rank) {
    auto group = make_shm_group(segment, rank, {.timeout = timeout});
    errors[static_cast<std::size_t>(rank)] = error_of([&] { body(*group); });
  });
  return errors;
}

// Ranks end a generation at different times, with any number of operations: nobody is disturbed.
TEST(ShmGenerationTest, FollowOneAnother) {
  const auto segment = make_segment(3, 16 << 20);
  std::vector<std::string> errors(3);
  run_threads(3, [&](int rank) {
    errors[static_cast<std::size_t>(rank)] = error_of([&] {
      for (std::uint64_t generation = 0; generation < 300; ++generation) {
        auto group =
            make_shm_group(segment, rank, {.generation = generation, .timeout = kTestTimeout});
        for (std::uint64_t i = 0; i < generation % 4; ++i) {
          float value = 1;
          group->all_reduce(std::as_writable_bytes(std::span(&value, 1)), Dtype::float32,
                            Reduction::sum);
          EXPECT_EQ(value, 3);
        }
      }
    });
  });
  EXPECT_THAT(errors, ::testing::Each("no error"));
}

TEST(ShmGenerationTest, SplitsLeaveTheArenasRoom) {
  const auto segment = make_segment(2, 64 << 20);
  run_threads(2, [&](int rank) {
    for (std::uint64_t generation = 0; generation < 6; ++generation) {
      auto group =
          make_shm_group(segment, rank, {.generation = generation, .timeout = kTestTimeout});
      const auto gradients = group->allocate(20 << 20, "gradients");
      EXPECT_EQ(gradients.size(), 20u << 20);
      auto pair = group->split(0, 0);
      pair->barrier();
      if (generation % 2 == 0) group.reset();  // the sub-group may outlive it
    }
  });
  EXPECT_EQ(segment->control(0).arena_used.load(), 0u);
}

TEST(ShmGenerationTest, WhoIsAheadIsNotWaitedFor) {
  const auto segment = make_segment(2, 16 << 20);
  std::atomic<int> began = 0;
  run_threads(2, [&](int rank) {
    auto group = make_shm_group(segment, rank, {.timeout = kTestTimeout});
    if (rank == 1) {
      while (began.load() == 0) std::this_thread::yield();
      const std::string error =
          error_of([&] { make_shm_group(segment, 1, {.generation = 1, .timeout = 1s}); });
      EXPECT_THAT(error, HasSubstr("waiting for rank 0"));
      return;
    }
    began = 1;
    EXPECT_THAT(error_of([&] { group->barrier(); }),
                HasSubstr("rank 1 is in generation 1 already, this group is of generation 0"));
  });
}

TEST(ShmGenerationTest, AllocatedMemoryIsZeroWhateverALateRankWrote) {
  const auto segment = make_segment(1, 16 << 20);
  const auto memory = segment->allocate(0, 4 << 20, "memory");
  segment->release(0, memory);
  std::memset(memory.data(), 1, memory.size());
  const auto again = segment->allocate(0, 4 << 20, "memory");
  EXPECT_EQ(again.data(), memory.data());
  EXPECT_TRUE(std::ranges::all_of(again, [](std::byte byte) { return byte == std::byte{0}; }));
}

// Rank 1 is stopped in the middle of copying. Rank 0 gives up, and its memory is used for something
// else: rank 1 must not take that for its result.
TEST(ShmGenerationTest, WhatWasGivenUpIsNobodysResult) {
  if (kThreadSanitizer) GTEST_SKIP() << "forked ranks; see ranks_test.h";
  constexpr std::size_t kBytes = 96 << 20;
  const auto segment = make_segment(2, 400 << 20);
  Processes processes(segment);
  processes.start(1, [](const auto& shared, const auto& report) {
    auto group = make_shm_group(shared, 1, {.timeout = kTestTimeout});
    std::vector<std::byte> data(kBytes);
    group->barrier();
    report("ready");
    const std::string error = error_of([&] { group->broadcast(data, Dtype::uint8, 0); });
    const bool whole =
        std::ranges::all_of(data, [](std::byte byte) { return byte == std::byte{1}; });
    report(error != "no error" ? "an error" : whole ? "the data" : "something else");
  });
  {
    auto group = make_shm_group(segment, 0, {.timeout = kTestTimeout});
    const auto data = group->allocate(kBytes, "data");
    std::memset(data.data(), 1, data.size());
    group->barrier();
    ASSERT_EQ(processes.line(1), "ready");
    std::jthread stopper([&] {
      const auto& recorder = segment->recorder(1);
      while (recorder.opened.load() < 3) std::this_thread::yield();  // join, barrier, broadcast
      processes.signal(1, SIGSTOP);
    });
    error_of([&] { group->broadcast(data, Dtype::uint8, 0, {.timeout = 200ms}); });
    std::memset(data.data(), 7, data.size());
  }
  processes.signal(1, SIGCONT);
  EXPECT_THAT(processes.line(1), ::testing::AnyOf("an error", "the data"));
}

TEST(ShmMismatchTest, UnevenCountsThatDifferWhereNothingIsSent) {
  const auto errors = errors_of(2, [](Group& group) {
    const std::vector<std::uint64_t> none = {0, 0}, one = {0, 1};
    std::vector<std::byte> output(group.rank() == 0 ? 1 : 0);
    group.all_to_all_uneven({}, none, output, group.rank() == 0 ? one : none, Dtype::uint8);
  });
  for (const std::string& error : errors)
    EXPECT_THAT(error, HasSubstr("rank 1 sends 0 elements to rank 0, which expects 1"));
}

TEST(ShmMismatchTest, AMessageAgainstACollective) {
  const auto errors = errors_of(2, [](Group& group) {
    std::vector<std::byte> data(8);
    group.barrier();
    if (group.rank() == 0)
      group.send(data, Dtype::uint8, 1, {.tag = "a"});
    else
      group.all_reduce(data, Dtype::uint8, Reduction::sum, {.tag = "b"});
  });
  for (const std::string& error : errors)
    EXPECT_THAT(error, AllOf(HasSubstr("send(uint8 × 8, to rank 1, tag 'a')"),
                             HasSubstr("all_reduce(uint8 × 8, sum, tag 'b')")));
}

TEST(ShmMismatchTest, MisalignedMemoryIsRefused) {
  const auto errors = errors_of(2, [](Group& group) {
    alignas(8) std::byte data[12];
    group.all_reduce(std::span(data).subspan(1, 8), Dtype::float32, Reduction::sum);
  });
  for (const std::string& error : errors)
    EXPECT_THAT(error, HasSubstr("all_reduce: the memory is not aligned to its float32 elements"));
}

// A rank that announces a split and then dies, or never joins the new group.
TEST(ShmSplitTest, ItsTimeoutCoversTheJoin) {
  if (kThreadSanitizer) GTEST_SKIP() << "forked ranks; see ranks_test.h";
  const auto segment = make_segment(2, 16 << 20);
  Processes processes(segment);
  processes.start(1, [](const auto& shared, const auto&) {
    auto group = make_shm_group(shared, 1, {.timeout = kTestTimeout});
    group->barrier();
    ::raise(SIGKILL);
  });
  auto group = make_shm_group(segment, 0, {.timeout = kTestTimeout});
  group->barrier();
  processes.join(1);
  const auto before = Clock::now();
  EXPECT_THAT(error_of([&] { group->split(0, 0, {.timeout = kTestTimeout}); }),
              HasSubstr("rank 1 died"));
  EXPECT_LT(Clock::now() - before, kTestTimeout / 2);
}

TEST(FlightRecorderTest, ARecordThatIsClosedARingLaterIsNotAnothers) {
  const auto segment = make_segment(1, 1 << 20);
  FlightRecorder& recorder = segment->recorder(0);
  const std::uint64_t slow = claim_record(recorder);
  open_record(recorder, slow, {});
  std::uint64_t last = 0;
  for (std::size_t i = 0; i < kRecordedOperations; ++i) {
    last = claim_record(recorder);
    open_record(recorder, last, {});
  }
  close_record(recorder, slow, 5, 1);
  EXPECT_EQ(read_records(recorder).back().serial, last);
  EXPECT_EQ(read_records(recorder).back().ended_at_ns, 0);
}

}  // namespace
}  // namespace lockstep
