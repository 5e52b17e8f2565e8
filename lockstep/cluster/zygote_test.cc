#include "lockstep/cluster/zygote.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <ctime>

#include "lockstep/collective/ranks_test.h"

namespace lockstep {
namespace {

// This program, started as a zygote, serves before its tests begin; its workers are shells.
[[maybe_unused]] const bool kServed = [] {
  const char* socket = ::getenv("LOCKSTEP_ZYGOTE_FD");
  if (socket == nullptr) return false;
  serve_as_zygote(::atoi(socket));
  ::execl("/bin/sh", "sh", "-c", ::getenv("SCRIPT"), nullptr);
  ::_exit(127);
}();

int await_answer(Zygote& zygote) {
  pollfd readable{zygote.socket(), POLLIN, 0};
  EXPECT_EQ(::poll(&readable, 1, 60'000), 1);
  return zygote.answer().value_or(0);
}

// A worker becomes ours a moment after its id is known: when the process between has ended.
int wait_for(int pid, int& status, int flags) {
  const time_t deadline = ::time(nullptr) + 60;
  int found = -1;
  while ((found = ::waitpid(pid, &status, flags)) < 0 && errno == ECHILD &&
         ::time(nullptr) < deadline)
    ::sched_yield();
  return found;
}

std::string read_all(int fd) {
  std::string text;
  std::array<char, 4096> bytes;
  pollfd readable{fd, POLLIN, 0};
  for (ssize_t count = 1; count != 0;) {
    if (::poll(&readable, 1, 60'000) != 1) break;
    count = ::read(fd, bytes.data(), bytes.size());
    if (count > 0) text.append(bytes.data(), std::size_t(count));
  }
  return text;
}

class ZygoteTest : public testing::Test {
 protected:
  ZygoteTest() {
    ::prctl(PR_SET_CHILD_SUBREAPER, 1);
    Environment environment = process_environment();
    environment["COMMON"] = "everyone's";
    process_ = zygote_.start({"/proc/self/exe"}, environment, make_streams().write);
  }
  ~ZygoteTest() override {
    ::kill(process_.pid, SIGKILL);
    ::waitpid(process_.pid, nullptr, 0);
    ::prctl(PR_SET_CHILD_SUBREAPER, 0);
  }
  void SetUp() override {
    if (kThreadSanitizer) GTEST_SKIP() << "it has a thread of its own, and a zygote has none";
  }
  Zygote zygote_;
  Process process_;
};

TEST_F(ZygoteTest, ForksWorkersThatAreOursAndHaveTheirOwnPlace) {
  for (int rank = 0; rank < 3; ++rank) {
    const std::string script = "echo $RANK of $COMMON; echo aside >&2; exit $RANK";
    StreamEnds streams = make_streams();
    ASSERT_EQ(zygote_.request({{"RANK", std::to_string(rank)}, {"SCRIPT", script}}, streams.write,
                              STDIN_FILENO),
              0);
    streams.write = {};
    const int pid = await_answer(zygote_);
    ASSERT_GT(pid, 0);
    EXPECT_EQ(::getpgid(pid), pid);
    EXPECT_EQ(read_all(streams.read.output.get()), std::to_string(rank) + " of everyone's\n");
    EXPECT_EQ(read_all(streams.read.error.get()), "aside\n");
    int status = 0;
    EXPECT_EQ(wait_for(pid, status, 0), pid);
    EXPECT_EQ(WEXITSTATUS(status), rank);
  }
}

TEST_F(ZygoteTest, ItsEndIsNoticedAndItsWorkersGoOn) {
  StreamEnds streams = make_streams();
  ASSERT_EQ(zygote_.request({{"SCRIPT", "exec sleep 1000"}}, streams.write, STDIN_FILENO), 0);
  const int pid = await_answer(zygote_);
  ASSERT_GT(pid, 0);
  ::kill(process_.pid, SIGKILL);
  EXPECT_EQ(await_answer(zygote_), 0);
  EXPECT_TRUE(zygote_.ended());
  EXPECT_NE(zygote_.request({}, streams.write, STDIN_FILENO), 0);
  int status = 0;
  EXPECT_EQ(wait_for(pid, status, WNOHANG), 0);
  ::kill(pid, SIGKILL);
  EXPECT_EQ(wait_for(pid, status, 0), pid);
}

}  // namespace
}  // namespace lockstep
