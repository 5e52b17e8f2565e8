#include "lockstep/cluster/agent.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr auto kLong = std::chrono::hours(1);  // never passes: a test that waits for it fails

struct Line {
  int rank;
  bool error;
  std::string text;
};

struct Watched {
  AgentResult result;
  std::vector<Line> lines;
  std::vector<std::pair<int, nlohmann::json>> events;

  std::vector<std::string> output(int rank, bool error = false) const {
    std::vector<std::string> texts;
    for (const Line& line : lines)
      if (line.rank == rank && line.error == error) texts.push_back(line.text);
    return texts;
  }
};

AgentOptions shell(int workers, const std::string& script) {
  AgentOptions options;
  options.workers = workers;
  options.command = {"/bin/sh", "-c", script};
  options.grace = kLong;
  return options;
}

Watched watch(AgentOptions options) {
  Watched watched;
  options.on_line = [&](int rank, bool error, std::string_view line) {
    watched.lines.push_back({rank, error, std::string(line)});
  };
  options.on_event = [&](int rank, const nlohmann::json& event) {
    watched.events.emplace_back(rank, event);
  };
  watched.result = run_agent(options);
  return watched;
}

bool is_gone(int pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  std::getline(stat, text);
  return text.empty() || text.substr(text.rfind(')')).starts_with(") Z");
}

void wait_until_gone(int pid) {
  const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  pollfd ended{pidfd.get(), POLLIN, 0};
  if (pidfd) {
    ASSERT_EQ(::poll(&ended, 1, 60'000), 1) << pid << " goes on";
  }
}

class Folder {
 public:
  Folder() {
    char name[] = "/tmp/lockstep-agent-test-XXXXXX";
    path_ = ::mkdtemp(name);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string operator/(const char* name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

TEST(Agent, EveryWorkerEndsWell) {
  const Watched watched = watch(shell(3, "echo I am $RANK; echo aside >&2"));
  EXPECT_TRUE(watched.result.ok);
  EXPECT_FALSE(watched.result.failure);
  EXPECT_EQ(watched.result.signal, 0);
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_THAT(watched.output(rank), ElementsAre("I am " + std::to_string(rank)));
    EXPECT_THAT(watched.output(rank, true), ElementsAre("aside"));
  }
}

TEST(Agent, GivesTorchrunsEnvironment) {
  AgentOptions options = shell(
      2,
      "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $GROUP_RANK $MASTER_ADDR $MASTER_PORT "
      "$TORCHELASTIC_RUN_ID $OMP_NUM_THREADS $EXTRA; echo $GLIBC_TUNABLES; cat; "
      "echo ${LOCKSTEP_LAUNCHER-none}");
  options.environment = {{"EXTRA", "given"}, {"TORCHELASTIC_RUN_ID", "seven"}};
  options.threads = 3;
  options.master_port = 1234;
  const Watched watched = watch(options);
  ASSERT_TRUE(watched.result.ok);
  const auto lines = watched.output(1);
  ASSERT_GE(lines.size(), 3u);
  EXPECT_EQ(lines[0], "1 2 1 2 0 127.0.0.1 1234 seven 3 given");
  EXPECT_THAT(lines[1], HasSubstr("glibc.malloc.mmap_max=0"));
  EXPECT_EQ(lines[2], "none");  // and `cat` saw an empty standard input
}

TEST(Agent, PassesTheSegmentOn) {
  AgentOptions options =
      shell(1, "echo $LOCKSTEP_LAUNCHER; readlink /proc/self/fd/$LOCKSTEP_SEGMENT_FD");
  options.segment = Segment::create({.seats = 1, .arena_bytes = 1 << 20});
  const Watched watched = watch(options);
  ASSERT_TRUE(watched.result.ok);
  EXPECT_THAT(watched.output(0), ElementsAre("lockstep", HasSubstr("memfd:")));
}

TEST(Agent, AnExitCodeEndsTheJob) {
  AgentOptions options =
      shell(2,
            "[ $RANK = 0 ] && exec sleep 1000; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do "
            "echo word $i >&2; done; exit 3");
  options.segment = Segment::create({.seats = 2, .arena_bytes = 1 << 20});
  const Watched watched = watch(options);
  EXPECT_FALSE(watched.result.ok);
  ASSERT_TRUE(watched.result.failure);
  const WorkerFailure& failure = *watched.result.failure;
  EXPECT_EQ(failure.rank, 1);
  EXPECT_EQ(failure.cause, "exited with code 3");
  ASSERT_EQ(failure.last_words.size(), 10u);
  EXPECT_EQ(failure.last_words.front(), "word 3");
  EXPECT_EQ(failure.last_words.back(), "word 12");
  const std::string first = "rank 1 (pid " + std::to_string(failure.pid) + "): exited with code 3";
  EXPECT_THAT(describe(failure), testing::StartsWith(first + "\n  word 3\n"));
  EXPECT_EQ(options.segment->abort_reason(), first);  // what the others' waits end with
}

TEST(Agent, NamesTheSignalThatKilled) {
  const Watched watched = watch(shell(2, "[ $RANK = 1 ] && kill -9 $$; exec sleep 1000"));
  ASSERT_TRUE(watched.result.failure);
  EXPECT_EQ(watched.result.failure->rank, 1);
  EXPECT_EQ(watched.result.failure->cause, "killed by signal 9 (SIGKILL)");
}

TEST(Agent, KillsWhatDoesNotEndWhenAsked) {
  const Folder folder;
  const std::string fifo = folder / "fifo";
  AgentOptions options =
      shell(2, "if [ $RANK = 0 ]; then trap '' TERM; echo > " + fifo +
                   "; while :; do sleep 1000; done; else read x < " + fifo + "; exit 1; fi");
  ASSERT_EQ(::system(("mkfifo " + fifo).c_str()), 0);
  options.grace = std::chrono::milliseconds(50);
  const Watched watched = watch(options);
  ASSERT_TRUE(watched.result.failure);
  EXPECT_EQ(watched.result.failure->rank, 1);
}

TEST(Agent, LeavesNoProcessBehind) {
  // Each worker leaves a child that has left its group and holds its pipes open, and that has one
  // more.
  const Watched watched = watch(shell(2,
                                      "setsid sh -c 'sleep 1000 & echo $!; echo $$; wait' & "
                                      "while [ ! -e /proc/$!/fd ]; do :; done; read x; exit 0"));
  EXPECT_TRUE(watched.result.ok);
  int seen = 0;
  for (const Line& line : watched.lines) {
    ++seen;
    EXPECT_TRUE(is_gone(std::stoi(line.text))) << line.text;
  }
  EXPECT_LE(seen, 4);
}

TEST(Agent, ReadsWhatWasWrittenBeforeTheEnd) {
  // The child that keeps the pipe open must not be waited for; what was written must not be lost.
  const Watched watched =
      watch(shell(1, "sleep 1000 & seq 1 5000; printf 'the last, unfinished line'"));
  EXPECT_TRUE(watched.result.ok);
  const auto lines = watched.output(0);
  ASSERT_EQ(lines.size(), 5001u);
  EXPECT_EQ(lines[4999], "5000");
  EXPECT_EQ(lines[5000], "the last, unfinished line");
}

TEST(Agent, CarriesEvents) {
  const Watched watched =
      watch(shell(2, "printf '\\021\\0\\0\\0{\"event\":\"hello\"}' > /dev/fd/$LOCKSTEP_EVENT_FD"));
  EXPECT_TRUE(watched.result.ok);
  ASSERT_EQ(watched.events.size(), 2u);
  EXPECT_NE(watched.events[0].first, watched.events[1].first);
  EXPECT_EQ(watched.events[0].second["event"], "hello");
}

TEST(Agent, ABrokenEventIsAnErrorThatNamesItsRank) {
  try {
    watch(shell(2,
                "[ $RANK = 1 ] && printf '\\4\\0\\0\\0nope' > /dev/fd/$LOCKSTEP_EVENT_FD; "
                "exec sleep 1000"));
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::StartsWith("rank 1 (pid "));
    EXPECT_THAT(error.what(), HasSubstr("not JSON"));
  }
}

TEST(Agent, BlamesTheWorkerThatDiedNotTheOneThatNoticed) {
  const Folder folder;
  const std::string fifo = folder / "fifo";
  ASSERT_EQ(::system(("mkfifo " + fifo + "0 " + fifo + "1").c_str()), 0);
  AgentOptions options = shell(2, "echo $$; read x < " + fifo +
                                      "$RANK; if [ $RANK = 0 ]; then printf "
                                      "'\\037\\0\\0\\0{\"event\":\"error\",\"kind\":\"comm\"}' > "
                                      "/dev/fd/$LOCKSTEP_EVENT_FD; exit 1; else kill -9 $$; fi");
  // Lets both die, rank 0 first, and the agent go on only then: it finds both at once.
  std::vector<int> pids;
  options.on_line = [&](int, bool, std::string_view line) {
    pids.push_back(std::stoi(std::string(line)));
    if (pids.size() < 2) return;
    for (const char* rank : {"0", "1"}) std::ofstream(fifo + rank) << "go\n";
    for (int pid : pids) wait_until_gone(pid);
  };
  const AgentResult result = run_agent(options);
  ASSERT_TRUE(result.failure);
  EXPECT_EQ(result.failure->rank, 1);
}

TEST(Agent, AnExceptionEndsTheWorkers) {
  AgentOptions options = shell(2, "echo $$; exec sleep 1000");
  std::vector<int> pids;
  options.on_line = [&](int, bool, std::string_view line) {
    pids.push_back(std::stoi(std::string(line)));
    if (pids.size() == 2) throw Error("the disk is full");
  };
  EXPECT_THROW(run_agent(options), Error);
  ASSERT_EQ(pids.size(), 2u);
  for (int pid : pids) EXPECT_TRUE(is_gone(pid));
}

TEST(Agent, Ticks) {
  const Folder folder;
  const std::string fifo = folder / "fifo";
  ASSERT_EQ(::system(("mkfifo " + fifo).c_str()), 0);
  AgentOptions options = shell(1, "read x < " + fifo);
  int ticks = 0;
  options.on_tick = [&] {
    if (++ticks == 2) std::ofstream(fifo) << "go\n";
  };
  EXPECT_TRUE(run_agent(options).ok);
  EXPECT_GE(ticks, 2);
}

std::string start_failure(const std::string& program) {
  AgentOptions options;
  options.workers = 2;
  options.command = {program};
  try {
    run_agent(options);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "started";
}

TEST(Agent, SaysWhatCouldNotBeStarted) {
  EXPECT_EQ(start_failure("/nowhere/program"),
            "could not start /nowhere/program: No such file or directory");
  EXPECT_EQ(start_failure("/etc/passwd"), "could not start /etc/passwd: Permission denied");
  const Folder folder;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(folder / "");
  std::ofstream("my_program") << "#!/bin/sh\n";
  EXPECT_EQ(start_failure("my_program"),
            "could not start my_program: No such file or directory; hint: did you mean "
            "./my_program?");
  std::filesystem::current_path(before);
}

// An agent in a process of its own, whose workers have told their ids.
class ForkedAgent {
 public:
  explicit ForkedAgent(const AgentOptions& base) {
    int ends[2];
    EXPECT_EQ(::pipe(ends), 0);
    UniqueFd write_end(ends[1]);
    const UniqueFd read_end(ends[0]);
    pid_ = ::fork();
    if (pid_ == 0) {
      AgentOptions options = base;
      options.on_line = [&](int, bool, std::string_view line) {
        const int pid = std::stoi(std::string(line));
        if (::write(write_end.get(), &pid, sizeof pid) < 0) ::_exit(1);
      };
      const AgentResult result = run_agent(options);
      ::_exit(result.signal != 0 && !result.failure && !result.ok ? 100 + result.signal : 1);
    }
    for (int& worker : workers_)
      EXPECT_EQ(::read(read_end.get(), &worker, sizeof worker), ssize_t(sizeof worker));
  }
  ~ForkedAgent() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
  }
  void signal(int number) { ::kill(pid_, number); }
  int wait() {
    int status = 0;
    ::waitpid(std::exchange(pid_, -1), &status, 0);
    return status;
  }
  const std::array<int, 2>& workers() const { return workers_; }

 private:
  int pid_ = -1;
  std::array<int, 2> workers_{};
};

TEST(Agent, SignalsEndEveryWorker) {
  for (int number : {SIGTERM, SIGINT, SIGHUP}) {
    ForkedAgent agent(shell(2, "echo $$; exec sleep 1000"));
    agent.signal(number);
    const int status = agent.wait();
    EXPECT_EQ(WEXITSTATUS(status), 100 + number);
    for (int pid : agent.workers()) EXPECT_TRUE(is_gone(pid));
  }
}

TEST(Agent, ASecondSignalDoesNotWait) {
  ForkedAgent agent(shell(2, "trap '' TERM; echo $$; while :; do sleep 1000; done"));
  agent.signal(SIGINT);
  agent.signal(SIGTERM);
  EXPECT_GT(WEXITSTATUS(agent.wait()), 100);
  for (int pid : agent.workers()) EXPECT_TRUE(is_gone(pid));
}

TEST(Agent, WorkersDieWithAKilledAgent) {
  ForkedAgent agent(shell(2, "echo $$; exec sleep 1000"));
  agent.signal(SIGKILL);
  agent.wait();
  for (int pid : agent.workers()) wait_until_gone(pid);
}

}  // namespace
}  // namespace lockstep
