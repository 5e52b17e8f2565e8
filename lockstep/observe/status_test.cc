#include "lockstep/observe/status.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lockstep {
namespace {

using Json = nlohmann::json;
using testing::HasSubstr;

constexpr double kStart = 1'000'000;

Status job(int workers = 2, int least = 1) {
  return Status({.title = "a job",
                 .folder = "runs/a-1",
                 .workers = workers,
                 .least = least,
                 .started = kStart,
                 .hang_timeout_s = 30});
}

Json ready() {
  return {{"event", "ready"},    {"rank", 0},        {"train_samples", 1000},
          {"test_samples", 100}, {"parameters", 10}, {"steps_per_epoch", 10},
          {"epochs", 5}};
}

void begin(Status& status) {
  for (int rank : {0, 1}) status.on_event(rank, {{"event", "join"}}, kStart + 1);
  status.on_event(0, ready(), kStart + 1);
  status.on_event(0, {{"event", "first_step"}, {"rank", 0}, {"clock", 50.0}}, kStart + 2);
}

void step(Status& status, int number, double now, Json loss = 0.5) {
  status.on_event(0,
                  {{"event", "step"},
                   {"epoch", 1},
                   {"step", number},
                   {"samples", 100 * number},
                   {"steps_per_epoch", 10},
                   {"loss", std::move(loss)},
                   {"grad_norm", 2.0},
                   {"lr", 0.1},
                   {"clock", now - kStart + 48}},
                  now);
}

void generation(Status& status, int number, std::vector<int> seats, double now) {
  Json ranks = Json::array();
  for (std::size_t rank = 0; rank < seats.size(); ++rank)
    ranks.push_back({{"rank", rank}, {"seat", seats[rank]}, {"pid", 100 + seats[rank]}});
  status.on_event(-1,
                  {{"event", "generation"},
                   {"generation", number},
                   {"ranks", ranks},
                   {"reason", "because of " + std::to_string(number)},
                   {"clock", 0.0}},
                  now);
}

void worker(Status& status, int seat, int rank, const char* state, const char* cause, double now) {
  status.on_event(-1,
                  {{"event", "worker"},
                   {"seat", seat},
                   {"rank", rank},
                   {"pid", 100 + seat},
                   {"state", state},
                   {"cause", cause},
                   {"clock", 0.0}},
                  now);
}

TEST(Status, BeforeAnythingIsKnown) {
  const Json status = job().json(kStart + 1);
  EXPECT_EQ(status.at("state"), "starting");
  EXPECT_EQ(status.at("title"), "a job");
  EXPECT_EQ(status.at("health"), (Json{{"ok", true}, {"reason", ""}}));
  for (const char* member : {"generation", "ended", "last_step_s"})
    EXPECT_TRUE(status.at(member).is_null()) << member;
  for (const char* member : {"workers", "generations", "recoveries", "epochs", "events"})
    EXPECT_EQ(status.at(member), Json::array()) << member;
  EXPECT_TRUE(status.at("progress").at("loss").is_null());
}

TEST(Status, WorkersSpeakForThemselvesWhereNoAgentDoes) {
  Status status = job();
  begin(status);
  step(status, 1, kStart + 3);
  step(status, 2, kStart + 4, nullptr);
  const Json json = status.json(kStart + 6);
  EXPECT_EQ(json.at("state"), "training");
  ASSERT_EQ(json.at("workers").size(), 2u);
  EXPECT_EQ(json.at("workers")[1].at("rank"), 1);
  EXPECT_EQ(json.at("workers")[1].at("state"), "member");
  EXPECT_EQ(json.at("workers")[1].at("since"), kStart + 2);
  EXPECT_TRUE(json.at("workers")[1].at("pid").is_null());
  EXPECT_EQ(json.at("steps").at("step"), (Json{1, 2}));
  EXPECT_EQ(json.at("steps").at("loss"), (Json{0.5, nullptr}));
  EXPECT_EQ(json.at("steps").at("samples_per_s"), (Json{nullptr, 100.0}));
  EXPECT_EQ(json.at("progress").at("steps"), 50);
  EXPECT_EQ(json.at("last_step_s"), 2.0);
}

Json epoch(int number) {
  return {{"event", "epoch"},         {"epoch", number},  {"step", 10 * number},
          {"train_loss", 1.0},        {"grad_norm", 1.0}, {"lr", 1.0},
          {"samples", 1000 * number}, {"seconds", 1.0},   {"eval_seconds", 0.0}};
}

// The generation before may have ended before it told of an epoch, or may have told of it.
TEST(Status, AnEpochCountsOnceInWhateverGeneration) {
  Status status = job();
  begin(status);
  status.on_event(0, epoch(1), kStart + 3);
  Json again = ready();
  again["resumed"] = {{"step", 20},
                      {"samples", 2000},
                      {"epochs", {epoch(1), epoch(2)}},
                      {"loss", 1.0},
                      {"weight", 1.0}};
  status.on_event(0, again, kStart + 4);
  status.on_event(0, epoch(2), kStart + 5);
  const Json epochs = status.json(kStart + 6).at("epochs");
  ASSERT_EQ(epochs.size(), 2u);
  EXPECT_EQ(epochs[1].at("epoch"), 2);
}

TEST(Status, ADeathAndItsRecovery) {
  Status status = job(2, 2);
  begin(status);
  generation(status, 0, {0, 1}, kStart + 2);
  worker(status, 2, -1, "ready", "", kStart + 2);
  step(status, 7, kStart + 3);
  worker(status, 1, 1, "ended", "killed by signal 9 (SIGKILL)", kStart + 4);
  Json json = status.json(kStart + 4);
  EXPECT_EQ(json.at("state"), "waiting for workers");
  EXPECT_EQ(json.at("health").at("ok"), false);
  EXPECT_THAT(json.at("health").at("reason"), HasSubstr("fewer workers than the 2"));
  EXPECT_EQ(json.at("deaths"), 1);

  generation(status, 1, {0, 2}, kStart + 4.1);
  json = status.json(kStart + 4.1);
  EXPECT_EQ(json.at("state"), "recovering");
  EXPECT_EQ(json.at("health").at("ok"), true);
  status.on_event(-1,
                  {{"event", "recovery"},
                   {"rank", 1},
                   {"cause", "killed by signal 9 (SIGKILL)"},
                   {"seconds", 0.04},
                   {"steps_redone", 1},
                   {"source", "segment"},
                   {"rejoined_seconds", 0.05},
                   {"generation", 1}},
                  kStart + 4.2);
  json = status.json(kStart + 5);
  EXPECT_EQ(json.at("state"), "training");
  EXPECT_EQ(json.at("generation"), 1);
  EXPECT_EQ(json.at("recovery_count"), 1);
  EXPECT_EQ(json.at("recoveries")[0].at("step"), 7);
  EXPECT_EQ(json.at("recoveries")[0].at("source"), "segment");
  EXPECT_EQ(json.at("generations")[1].at("reason"), "because of 1");
  ASSERT_EQ(json.at("workers").size(), 3u);  // members by rank, then the dead one
  EXPECT_EQ(json.at("workers")[1].at("seat"), 2);
  EXPECT_EQ(json.at("workers")[1].at("last_death").at("cause"), "killed by signal 9 (SIGKILL)");
  EXPECT_FALSE(json.at("workers")[0].contains("last_death"));
  EXPECT_EQ(json.at("workers")[2].at("seat"), 1);
  EXPECT_EQ(json.at("workers")[2].at("state"), "ended");
}

TEST(Status, AWorkerThatIsNoMemberAnyMore) {
  Status status = job();
  generation(status, 0, {0, 1}, kStart + 1);
  generation(status, 1, {1}, kStart + 2);
  worker(status, 0, -1, "ended", "exited with code 0", kStart + 3);
  worker(status, 2, -1, "ended", "not needed any more", kStart + 3);
  const Json json = status.json(kStart + 4);
  EXPECT_EQ(json.at("deaths"), 0);  // it was asked to
  EXPECT_EQ(json.at("workers")[0].at("seat"), 1);
  EXPECT_EQ(json.at("workers")[0].at("rank"), 0);
  EXPECT_EQ(json.at("workers")[1].at("state"), "ended");
}

TEST(Status, ASeatThatIsUsedAgainIsAnotherWorkers) {
  Status status = job();
  generation(status, 0, {0, 1}, kStart + 1);
  worker(status, 1, 1, "ended", "exited with code 3", kStart + 2);
  status.on_event(-1,
                  {{"event", "worker"},
                   {"seat", 1},
                   {"rank", -1},
                   {"pid", 999},
                   {"state", "starting"},
                   {"cause", ""}},
                  kStart + 3);
  const Json row = status.json(kStart + 4).at("workers")[1];
  EXPECT_EQ(row.at("pid"), 999);
  EXPECT_EQ(row.at("state"), "starting");
  EXPECT_TRUE(row.at("rank").is_null());
  EXPECT_EQ(row.at("cause"), "");
}

TEST(Status, AHangIsNotHealthy) {
  Status status = job();
  EXPECT_FALSE(status.json(kStart + 31).at("health").at("ok"));  // a start that takes too long, too
  begin(status);
  step(status, 1, kStart + 40);
  EXPECT_TRUE(status.json(kStart + 70).at("health").at("ok"));
  EXPECT_EQ(status.json(kStart + 71).at("health").at("reason"),
            "no committed step for 31 s (the limit is 30 s)");
}

TEST(Status, Ends) {
  Status status = job();
  begin(status);
  status.on_event(-1, {{"event", "end"}, {"failed", ""}}, kStart + 9);
  EXPECT_EQ(status.json(kStart + 900).at("state"), "finished");
  EXPECT_TRUE(status.json(kStart + 900).at("health").at("ok"));
  EXPECT_EQ(status.json(kStart + 900).at("ended"), kStart + 9);

  status.on_event(-1, {{"event", "end"}, {"failed", "rank 1 died"}}, kStart + 10);
  const Json failed = status.json(kStart + 11);
  EXPECT_EQ(failed.at("state"), "failed");
  EXPECT_EQ(failed.at("reason"), "rank 1 died");
  EXPECT_EQ(failed.at("health").at("reason"), "the job failed: rank 1 died");

  status.on_event(-1,
                  {{"event", "run"}, {"title", "again"}, {"workers", 3}, {"started", kStart + 20}},
                  kStart + 20);
  const Json again = status.json(kStart + 21);
  EXPECT_EQ(again.at("state"), "starting");
  EXPECT_EQ(again.at("title"), "again");
  EXPECT_EQ(again.at("started"), kStart);
  EXPECT_TRUE(again.at("ended").is_null());
  EXPECT_EQ(again.at("workers"), Json::array());
}

TEST(Status, IsBounded) {
  Status status = job();
  begin(status);
  const std::string longer(100'000, 'x');
  for (int i = 0; i < 5000; ++i) {
    step(status, i, kStart + i);
    status.on_event(1, {{"event", "output"}, {"text", longer}}, kStart + i);
    generation(status, i, {0, 1}, kStart + i);
    status.on_event(-1, {{"event", "recovery"}, {"rank", 1}, {"cause", longer}}, kStart + i);
    if (i % 2 == 0) status.on_event(0, epoch(i / 2 + 1), kStart + i);
  }
  const Json json = status.json(kStart);
  EXPECT_LE(json.at("steps").at("step").size(), 1000u);
  EXPECT_LE(json.at("epochs").size(), 501u);
  EXPECT_EQ(json.at("epochs").back().at("epoch"), 2500);
  EXPECT_EQ(json.at("generation_count"), 5000);
  EXPECT_EQ(json.at("recovery_count"), 5000);
  EXPECT_LT(json.dump().size(), 600'000u);
}

TEST(Status, RefusesWhatItCannotRead) {
  Status status = job();
  EXPECT_THROW(status.on_event(0, Json::object(), kStart), Json::exception);
  EXPECT_THROW(status.on_event(-1, {{"event", "worker"}, {"seat", "x"}}, kStart), Json::exception);
  EXPECT_THROW(status.on_event(-1, {{"event", "generation"}}, kStart), Json::exception);
  status.on_event(3, {{"event", "unheard of"}}, kStart);
  status.on_event(0, {{"event", "output"}, {"text", "\xff<b>"}}, kStart);
  EXPECT_NO_THROW(status.json(kStart).dump(-1, ' ', false, Json::error_handler_t::replace));
}

}  // namespace
}  // namespace lockstep
