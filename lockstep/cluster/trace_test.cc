#include "lockstep/cluster/trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/cluster/flight_recorder.h"
#include "lockstep/cluster/world.h"
#include "lockstep/collective/ranks_test.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

class TraceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "lockstep-XXXXXX").string();
    folder_ = ::mkdtemp(pattern.data());
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path file() const { return folder_ / "trace.json"; }
  nlohmann::json events() const {
    std::ifstream input(file());
    return nlohmann::json::parse(input).at("traceEvents");
  }
  Place place(int rank, int size) const {
    return {.launcher = Launcher::torchrun,
            .rank = rank,
            .size = size,
            .local_rank = rank,
            .local_size = size,
            .job_id = folder_.string(),
            .trace = file()};
  }
  // What files are left besides the trace.
  int others() const {
    int count = 0;
    for (const auto& entry : fs::directory_iterator(folder_)) count += entry.path() != file();
    return count;
  }
  fs::path folder_;
};

// More operations than the flight recorder holds: none is missing, none is there twice.
TEST_F(TraceTest, EveryOperationOfEveryRank) {
  constexpr int kRanks = 2, kOperations = 3000;
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < kRanks; ++rank)
    threads.emplace_back([this, rank] {
      const World world = init_from(place(rank, kRanks), {});
      std::vector<std::byte> data(40);
      for (int i = 1; i < kOperations; ++i)
        world.group().all_reduce(data, Dtype::float32, Reduction::sum, {.tag = "gradients"});
    });
  threads.clear();
  std::map<int, std::set<int>> sequences;
  int count = 0;
  for (const auto& event : events()) {
    if (event.at("ph") != "X") continue;
    ++count;
    sequences[event.at("pid")].insert(event.at("args").at("sequence").get<int>());
    EXPECT_GE(event.at("dur"), 0);
    EXPECT_EQ(event["args"]["state"], "done");
    if (event["args"]["sequence"] != 7) continue;
    EXPECT_EQ(event.at("name"), "all_reduce");
    EXPECT_EQ(event["args"]["bytes"], 40);
    EXPECT_EQ(event["args"]["dtype"], "float32");
    EXPECT_EQ(event["args"]["tag"], "gradients");
    EXPECT_GE(event["args"]["waited_us"], 0);
  }
  EXPECT_EQ(count, kRanks * kOperations);
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(sequences[rank].size(), static_cast<std::size_t>(kOperations));
    EXPECT_EQ(*sequences[rank].rbegin(), kOperations - 1);
  }
  EXPECT_EQ(others(), 0);
}

TEST_F(TraceTest, AGroupOfOneIsTracedToo) {
  init_from({.trace = file()}, {}).group().barrier({.tag = "alone"});
  EXPECT_EQ(events().back().at("args").at("tag"), "alone");
}

TEST_F(TraceTest, APlaceThatCannotBeWrittenIsRefused) {
  EXPECT_THROW(prepare_trace(folder_ / "none" / "trace.json", 2), ConfigError);
}

// The agent's way: ranks only leave their parts; one is killed in the middle of an operation.
TEST_F(TraceTest, AKilledRankIsThereToTheEnd) {
  if (kThreadSanitizer) GTEST_SKIP() << "a forked rank; see ranks_test.h";
  const auto segment = Segment::create({.seats = 2, .arena_bytes = 16 << 20});
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    RankTrace trace(segment, 1, file(), false);
    auto group = make_shm_group(segment, 1, {.on_records = [&] { trace.copy_records(); }});
    for (int i = 0; i < 1500; ++i) group->barrier();
    group->barrier({.tag = "the last"});
    ::_exit(0);
  }
  {
    RankTrace trace(segment, 0, file(), false);
    auto group = make_shm_group(segment, 0, {.on_records = [&] { trace.copy_records(); }});
    for (int i = 0; i < 1500; ++i) group->barrier();
    // Rank 1 is in the operation that this rank never enters.
    const Deadline deadline = Deadline::after(std::chrono::seconds(60));
    const auto last = [&] { return last_operations(*segment); };
    while (last().find("'the last'") == std::string::npos && !deadline.expired())
      std::this_thread::yield();
    EXPECT_THAT(last(), ::testing::ContainsRegex(
                            "rank 1 \\(pid [0-9]+, alive\\): in operation 1501 of generation 0, "
                            "barrier\\(tag 'the last'\\), for [0-9.]+ s"));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
  }
  write_trace(*segment, file());
  std::map<int, int> counts;
  nlohmann::json open;
  for (const auto& event : events()) {
    if (event.at("ph") != "X") continue;
    ++counts[event.at("pid")];
    if (event["args"]["state"] == "open") open = event;
  }
  EXPECT_EQ(counts[0], 1501);  // with join()
  EXPECT_EQ(counts[1], 1502);
  ASSERT_FALSE(open.is_null());
  EXPECT_EQ(open["pid"], 1);
  EXPECT_EQ(open["args"]["tag"], "the last");
  EXPECT_EQ(others(), 0);

  const nlohmann::json recorded = flight_record(*segment);
  ASSERT_EQ(recorded.at("ranks").size(), 2u);
  const auto& rank_1 = recorded["ranks"][1];
  EXPECT_EQ(rank_1.at("process"), "dead");
  EXPECT_EQ(rank_1.at("operations_begun"), 1502);
  EXPECT_EQ(rank_1.at("operations").size(), 1024u);
  EXPECT_EQ(rank_1["operations"].back().at("state"), "open");
  EXPECT_TRUE(rank_1["operations"].back().at("end_ns").is_null());
  EXPECT_EQ(rank_1["operations"].back().at("call"), "barrier(tag 'the last')");
  EXPECT_THAT(last_operations(*segment),
              ::testing::HasSubstr("rank 0 (pid " + std::to_string(::getpid()) +
                                   ", alive): after operation 1500 of generation 0, barrier()"));
}

}  // namespace
}  // namespace lockstep
