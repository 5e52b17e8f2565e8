#include "lockstep/cluster/fault_injector.h"

#include <gmock/gmock.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <new>
#include <nlohmann/json.hpp>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/event.h"

namespace lockstep {
namespace {

using testing::HasSubstr;
using testing::Optional;
using testing::ThrowsMessage;

constexpr int kWentOn = 77;  // exit code of a child that nothing struck

World alone(const std::string& faults) {
  Place place;
  place.inject = faults;
  return init_from(place, {});
}

struct Ending {
  int status = 0;
  std::vector<nlohmann::json> events;
};

// A child that passes the points of steps 1 to 5. Its wait status, WUNTRACED, and what it told.
Ending child(const std::string& faults, const std::shared_ptr<Segment>& segment = nullptr) {
  int ends[2];
  EXPECT_EQ(::pipe(ends), 0);
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  const int pid = ::fork();
  if (pid == 0) {
    Place place;
    place.inject = faults;
    place.event_fd = write_end.release();
    if (segment != nullptr) place.segment_fd = ::dup(segment->fd());
    FaultInjector injector(init_from(place, {}));
    for (std::uint64_t step = 1; step <= 5; ++step)
      for (const Point point : {Point::start, Point::computed, Point::committed})
        injector.at(point, step);
    ::_exit(kWentOn);
  }
  write_end = UniqueFd();
  Ending ending;
  EXPECT_EQ(::waitpid(pid, &ending.status, WUNTRACED), pid);
  if (WIFSTOPPED(ending.status)) {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
  EventReader reader;
  std::byte bytes[4096];
  for (ssize_t count; (count = ::read(read_end.get(), bytes, sizeof bytes)) > 0;)
    for (nlohmann::json& event : reader.feed(std::span(bytes).first(std::size_t(count))))
      ending.events.push_back(std::move(event));
  return ending;
}

TEST(FaultInjector, NothingWithoutFaultsOrAtOtherPoints) {
  EXPECT_TRUE(FaultInjector(alone("")).empty());
  const Ending ending =
      child("kill rank=1 step=3\nkill rank=0 step=6\nkill rank=0 step=1 when=evaluating");
  EXPECT_EQ(WEXITSTATUS(ending.status), kWentOn);
  EXPECT_TRUE(ending.events.empty());
}

TEST(FaultInjector, EndsTheProcessInEveryWay) {
  const auto killed_by = [](const std::string& fault) {
    const Ending ending = child(fault);
    return WIFSIGNALED(ending.status) ? WTERMSIG(ending.status) : 0;
  };
  EXPECT_EQ(killed_by("kill rank=0 step=2"), SIGKILL);
  EXPECT_EQ(killed_by("kill rank=0 step=2 signal=TERM when=start"), SIGTERM);
  EXPECT_EQ(killed_by("oom-kill rank=0 step=2"), SIGKILL);
  EXPECT_EQ(WEXITSTATUS(child("exit rank=0 step=5 code=3 when=committed").status), 3);
  EXPECT_TRUE(WIFSTOPPED(child("stop rank=0 step=2").status));
}

TEST(FaultInjector, IsToldBeforeItStrikes) {
  const Ending ending = child("kill rank=0 step=3");
  ASSERT_EQ(ending.events.size(), 1u);
  EXPECT_EQ(ending.events[0].at("event"), "injected");
  EXPECT_EQ(ending.events[0].at("fault"), "kill rank=0 step=3 when=computed");
  EXPECT_EQ(ending.events[0].at("step"), 3);
  EXPECT_GT(ending.events[0].at("clock"), 0);
}

TEST(FaultInjector, StrikesOnceInTheJobsLife) {
  const auto segment = Segment::create({.seats = 1, .arena_bytes = 1 << 20});
  const std::string faults = "exit rank=0 step=3 code=1\nexit rank=0 step=3 code=2";
  EXPECT_EQ(WEXITSTATUS(child(faults, segment).status), 1);
  EXPECT_EQ(WEXITSTATUS(child(faults, segment).status), 2);
  EXPECT_EQ(WEXITSTATUS(child(faults, segment).status), kWentOn);
}

TEST(FaultInjector, ARankThatCameLaterIsStruckLater) {
  FaultInjector injector(alone("throw rank=0 step=3"));
  injector.at(Point::computed, 2);
  EXPECT_THAT([&] { injector.at(Point::computed, 7); },
              ThrowsMessage<Error>(HasSubstr("throw rank=0 step=3 when=computed")));
  injector.at(Point::computed, 8);
}

TEST(FaultInjector, MemoryRunsOutForOneAllocation) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer ends a process that runs out of memory";
#endif
  FaultInjector injector(alone("out-of-memory rank=0 step=1"));
  EXPECT_THROW(injector.at(Point::computed, 1), std::bad_alloc);
  EXPECT_EQ(std::vector<char>(100 << 20, 'a').back(), 'a');
}

TEST(FaultInjector, FilesDoNotGrowOnAFullDisk) {
  const std::string path = testing::TempDir() + "full-disk-" + std::to_string(::getpid());
  const int pid = ::fork();
  if (pid == 0) {
    FaultInjector(alone("full-disk step=1")).at(Point::committed, 1);
    try {
      write_file_atomically(path, "text");
    } catch (const Error& error) {
      ::_exit(std::string(error.what()).ends_with("File too large") ? 1 : 2);
    }
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, 0), pid);
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_NE(::access(path.c_str(), F_OK), 0);
}

TEST(FaultInjector, HangsInEveryWay) {
  for (const char* fault : {"loop rank=0 step=1", "deadlock rank=0 step=1"}) {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    UniqueFd read_end(ends[0]), write_end(ends[1]);
    const int pid = ::fork();
    if (pid == 0) {
      Place place;
      place.inject = fault;
      place.event_fd = write_end.release();
      FaultInjector(init_from(place, {})).at(Point::computed, 1);
      ::_exit(0);
    }
    write_end = UniqueFd();
    char byte;
    EXPECT_EQ(::read(read_end.get(), &byte, 1), 1);  // it was told
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(::waitpid(pid, nullptr, WNOHANG), 0) << fault;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
}

TEST(FaultInjector, AMismatchFailsTheGroup) {
  std::vector<std::string> failures(2);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank)
    threads.emplace_back([&, rank] {
      Place place{.launcher = Launcher::torchrun, .rank = rank, .size = 2};
      place.local_rank = rank, place.local_size = 2;
      place.job_id = "fault test " + std::to_string(::getpid());
      place.inject = "mismatch rank=1 step=4";
      const World world = init_from(place, {.timeout = std::chrono::seconds(60)});
      FaultInjector injector(world);
      try {
        injector.at(Point::computed, 4);
        float value = 1;
        world.group().all_reduce(std::as_writable_bytes(std::span(&value, 1)), Dtype::float32,
                                 Reduction::sum);
      } catch (const CommError& error) {
        failures[std::size_t(rank)] = error.what();
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(failures, testing::Each(HasSubstr("injected mismatch")));
}

}  // namespace
}  // namespace lockstep
