// The agent with workers that it replaces: shells that say what elastic programs say.
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
#include <nlohmann/json.hpp>

#include "lockstep/base/file.h"
#include "lockstep/cluster/agent.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;
using testing::HasSubstr;
using testing::StartsWith;

constexpr const char* kSay =
    "say() { printf \"\\\\$(printf %03o ${#1})\\\\0\\\\0\\\\0%s\" \"$1\" > "
    "/dev/fd/$LOCKSTEP_EVENT_FD; }; seat=$LOCKSTEP_SEAT; say '{\"event\":\"elastic\"}'; "
    "say '{\"event\":\"join\"}'; ";

class AgentElasticTest : public testing::Test {
 protected:
  AgentElasticTest() {
    char name[] = "/tmp/lockstep-agent-test-XXXXXX";
    folder_ = ::mkdtemp(name);
  }
  ~AgentElasticTest() override { std::filesystem::remove_all(folder_); }

  AgentOptions workers(int count, const std::string& script) {
    AgentOptions options;
    options.workers = count;
    options.command = {"/bin/sh", "-c", kSay + script};
    options.grace = 1h;
    options.max_restarts = 3;
    options.segment = Segment::create({.seats = 2 * count, .arena_bytes = 1 << 20});
    return options;
  }
  AgentResult run(AgentOptions options) {
    options.on_event = [this](int rank, const json& event) {
      if (rank >= 0) return;
      events_.push_back(event);
      if (on_news_) on_news_(event);
    };
    return run_agent(options);
  }
  // Workers wait for these: one for each seat.
  std::string gates(int seats) {
    for (int seat = 0; seat < seats; ++seat)
      EXPECT_EQ(::system(("mkfifo " + folder_ + "/gate" + std::to_string(seat)).c_str()), 0);
    return "read x < " + folder_ + "/gate$seat; ";
  }
  void open_gate(int seat) { std::ofstream(folder_ + "/gate" + std::to_string(seat)) << "go\n"; }
  std::vector<json> news(const std::string& kind) const {
    std::vector<json> found;
    for (const json& event : events_)
      if (event.at("event") == kind) found.push_back(event);
    return found;
  }
  static std::vector<int> seats_of(const json& generation) {
    std::vector<int> seats;
    for (const json& rank : generation.at("ranks")) seats.push_back(rank.at("seat"));
    return seats;
  }

  std::string folder_;
  std::vector<json> events_;
  std::function<void(const json&)> on_news_;
};

TEST_F(AgentElasticTest, WhoDiesIsReplacedAtAnotherSeat) {
  const std::string gate = gates(4);
  on_news_ = [&](const json& event) {
    if (event.at("event") == "recovery") open_gate(2);  // only now may the last one finish
    if (event.at("event") != "generation") return;
    if (event.at("generation") == 0)
      open_gate(1);
    else
      open_gate(0);
  };
  const AgentResult result = run(
      workers(2, gate + "[ $seat = 1 ] && kill -9 $$; [ $seat = 0 ] && say "
                        "'{\"event\":\"recovered\",\"generation\":1,\"step\":8,\"steps_redone\":1,"
                        "\"source\":\"segment\",\"clock\":1e9}'; exit 0"));
  EXPECT_TRUE(result.ok) << (result.failure ? describe(*result.failure) : "");
  const auto generations = news("generation");
  ASSERT_EQ(generations.size(), 2u);
  EXPECT_EQ(seats_of(generations[0]), (std::vector{0, 1}));
  EXPECT_EQ(seats_of(generations[1]), (std::vector{0, 2}));
  EXPECT_THAT(generations[1].at("reason"), HasSubstr("killed by signal 9 (SIGKILL)"));
  const auto recoveries = news("recovery");
  ASSERT_EQ(recoveries.size(), 1u);
  EXPECT_EQ(recoveries[0].at("rank"), 1);
  EXPECT_EQ(recoveries[0].at("cause"), "killed by signal 9 (SIGKILL)");
  EXPECT_EQ(recoveries[0].at("steps_redone"), 1);
  EXPECT_EQ(recoveries[0].at("rejoined_seconds"), recoveries[0].at("seconds"));
}

TEST_F(AgentElasticTest, WithFewerWhereThatIsEnough) {
  const std::string gate = gates(2);
  on_news_ = [&](const json& event) {
    if (event.at("event") == "generation") open_gate(event.at("generation") == 0 ? 1 : 0);
  };
  AgentOptions options = workers(2, gate + "[ $seat = 1 ] && kill -9 $$; exit 0");
  options.least = 1;
  options.max_restarts = 0;
  EXPECT_TRUE(run(options).ok);
  const auto generations = news("generation");
  ASSERT_EQ(generations.size(), 2u);
  EXPECT_EQ(seats_of(generations[1]), std::vector{0});
}

TEST_F(AgentElasticTest, TooManyDeathsEndTheJobWithTheReason) {
  AgentOptions options = workers(1, "kill -9 $$");
  options.segment = Segment::create({.seats = 4, .arena_bytes = 1 << 20});
  options.max_restarts = 2;
  const AgentResult result = run(options);
  ASSERT_TRUE(result.failure);
  EXPECT_EQ(result.failure->cause, "killed by signal 9 (SIGKILL)");
  EXPECT_THAT(result.failure->note, HasSubstr("2 of 2 restarts in 60 s"));
}

TEST_F(AgentElasticTest, WithoutRestartsADeathReadsAsEver) {
  AgentOptions options = workers(2, "[ $seat = 1 ] && kill -9 $$; exec sleep 1000");
  options.max_restarts = 0;
  const AgentResult result = run(options);
  ASSERT_TRUE(result.failure);
  EXPECT_EQ(result.failure->rank, 1);
  EXPECT_EQ(result.failure->note, "");
}

TEST_F(AgentElasticTest, AnOwnErrorIsNotTriedAgain) {
  const AgentResult result = run(workers(
      1, "say '{\"event\":\"error\",\"kind\":\"run\",\"message\":\"the loss is inf\"}'; exit 1"));
  ASSERT_TRUE(result.failure);
  EXPECT_EQ(result.failure->cause, "exited with code 1");
  EXPECT_LE(news("generation").size(), 1u);
}

TEST_F(AgentElasticTest, WhoHangsIsNamedAndReplaced) {
  const std::string gate = gates(2);
  on_news_ = [&](const json& event) {
    if (event.at("event") == "generation") open_gate(event.at("generation"));
  };
  AgentOptions options = workers(1, gate + "[ $seat = 0 ] && kill -STOP $$; exit 0");
  options.hang_timeout = 300ms;
  EXPECT_TRUE(run(options).ok);
  const auto workers = news("worker");
  const auto hung = std::find_if(workers.begin(), workers.end(), [](const json& event) {
    return event.at("state") == "ended" && event.at("seat") == 0;
  });
  ASSERT_NE(hung, workers.end());
  EXPECT_THAT(hung->at("cause"), StartsWith("hung: no progress for 0."));
  EXPECT_THAT(hung->at("cause"), testing::EndsWith(", stopped by SIGSTOP"));
}

TEST_F(AgentElasticTest, WhoNeverGetsReadyIsReplaced) {
  const std::string gate = gates(2);
  on_news_ = [&](const json& event) {
    if (event.at("event") == "generation") open_gate(1);
  };
  AgentOptions options = workers(1, gate + "exit 0");
  options.command[2] = "[ $LOCKSTEP_SEAT = 0 ] && exec sleep 1000; " + options.command[2];
  options.elastic = true;
  options.start_timeout = 300ms;
  // Nobody has said yet that the program is elastic: known beforehand.
  EXPECT_TRUE(run(options).ok);
}

TEST_F(AgentElasticTest, AStandbyFillsInAndIsNotWaitedForAtTheEnd) {
  const std::string gate = gates(3);
  on_news_ = [&](const json& event) {
    if (event.at("event") == "generation") open_gate(seats_of(event)[0]);
  };
  AgentOptions options =
      workers(1, gate + "mkdir " + folder_ + "/first 2> /dev/null && kill -9 $$; exit 0");
  options.segment = Segment::create({.seats = 3, .arena_bytes = 1 << 20});
  options.standby = 1;
  EXPECT_TRUE(run(options).ok);
  const auto generations = news("generation");
  ASSERT_EQ(generations.size(), 2u);
  EXPECT_NE(seats_of(generations[0]), seats_of(generations[1]));
}

TEST_F(AgentElasticTest, AProgramThatIsNotElasticIsStartedAgainAsAWhole) {
  AgentOptions options = workers(2, "");
  options.command[2] =
      "[ $TORCHELASTIC_RESTART_COUNT = 2 ] && exit 0; [ $RANK = 1 ] && exit 3; exec sleep 1000";
  options.restart_all = true;
  const AgentResult result = run(options);
  EXPECT_TRUE(result.ok);
  EXPECT_EQ(news("message").size(), 2u);
  EXPECT_NE(result.segment, nullptr);
  options.max_restarts = 1;
  ASSERT_TRUE(run(options).failure);
}

// An agent in a process of its own; what its one worker prints first is a process id.
TEST_F(AgentElasticTest, AKilledAgentTakesAlongWhatItsWorkersStarted) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const UniqueFd read_end(ends[0]), write_end(ends[1]);
  const int agent = ::fork();
  if (agent == 0) {
    AgentOptions options = workers(1, "sleep 1000 & echo $!; wait");
    options.on_line = [&](int, bool, std::string_view line) {
      const int pid = std::stoi(std::string(line));
      if (::write(write_end.get(), &pid, sizeof pid) < 0) ::_exit(1);
    };
    run_agent(options);
    ::_exit(0);
  }
  int child = 0;
  ASSERT_EQ(::read(read_end.get(), &child, sizeof child), ssize_t(sizeof child));
  const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, child, 0)));
  ASSERT_TRUE(pidfd);
  ::kill(agent, SIGKILL);
  ::waitpid(agent, nullptr, 0);
  pollfd ended{pidfd.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&ended, 1, 60'000), 1);
}

}  // namespace
}  // namespace lockstep
