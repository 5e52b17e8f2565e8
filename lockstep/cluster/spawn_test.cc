#include "lockstep/cluster/spawn.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace lockstep {
namespace {

int start_child() {
  const int pid = ::fork();
  if (pid == 0)
    for (;;) ::pause();
  return pid;
}

TEST(Spawn, NamesSignals) {
  EXPECT_EQ(signal_name(SIGKILL), "SIGKILL");
  EXPECT_EQ(signal_name(SIGSEGV), "SIGSEGV");
  EXPECT_EQ(signal_name(63), "signal 63");
}

TEST(Spawn, EndsChildrenButNotThoseSpared) {
  const int spared = start_child();
  const auto before = child_processes();
  EXPECT_EQ(before, std::vector<int>{spared});
  const int other = start_child();
  EXPECT_TRUE(kill_children_except(before));
  EXPECT_EQ(child_processes(), before);
  EXPECT_NE(::kill(other, 0), 0);
  EXPECT_TRUE(kill_children_except({}));
  EXPECT_TRUE(child_processes().empty());
}

}  // namespace
}  // namespace lockstep
