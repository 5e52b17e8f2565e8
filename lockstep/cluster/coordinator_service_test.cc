// The coordinator's side of a job of several nodes, without a network: requests go in, and time.
#include "lockstep/cluster/coordinator_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/cluster/membership_wire.h"
#include "lockstep/cluster/reconcile.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;
using testing::HasSubstr;

struct Job {
  explicit Job(int nodes, int least)
      : service(
            {.policy = {.node_timeout = 1500ms},
             .least_nodes = least,
             .nodes = nodes,
             .self = introduction(0, "a"),
             .welcome = {},
             .server = &server},
            [this](const json& event) { events.push_back(event); }, now) {}

  static NodeIntroduction introduction(int rank, const std::string& agent, int after = -1) {
    return {.rank = rank,
            .host = "host" + std::to_string(rank),
            .agent = agent,
            .after = after,
            .least = 2,
            .workers = 2,
            .same = {{"program", "./it"}}};
  }
  json ask(const char* action, const json& arguments) {
    return service.answer({.id = 1, .action = action, .arguments = arguments},
                          {"route " + std::to_string(connection), connection}, now);
  }
  json join(const NodeIntroduction& node) { return ask("join", to_json(node)); }
  // All nodes of two, and what node 1 was told.
  NodeWelcome begin() {
    join(introduction(1, "b"));
    EXPECT_TRUE(service.gather(now));
    const NodeWelcome welcome = welcome_from(join(introduction(1, "b")).at("welcome"));
    here.emplace(0, 4, Clock::duration::max(), 2);
    there.emplace(welcome.node, 4, welcome.lease, 2);
    there->introduce(1, "host1");
    return welcome;
  }
  Assignment report(const json& more = json::object()) {
    json said{{"report", to_json(there->report(now))},
              {"published", 0},
              {"first", 0},
              {"events", json::array()}};
    said.update(more);
    return assignment_from(ask("report", said).at("assignment"));
  }
  Assignment decide() {
    service.take(here->report(now), now);
    return service.decide(now);
  }
  // Both nodes start what they are asked to, and it is ready.
  void start() {
    for (const auto& [roster, plan] :
         {std::pair(&*here, here->follow(decide())), std::pair(&*there, there->follow(report()))})
      for (const int seat : plan.start) roster->ready(roster->started(seat, 100 + seat));
    report();
    here->follow(decide());
    there->follow(report());
  }

  Clock::time_point now{1000s};
  int connection = 7;
  ControlServer server{{}};
  std::vector<json> events;
  CoordinatorService service;
  std::optional<Roster> here, there;
};

TEST(CoordinatorService, BeginsWhenAllNodesHaveCome) {
  Job job(2, 2);
  EXPECT_FALSE(job.service.gather(job.now));
  EXPECT_TRUE(job.join(Job::introduction(1, "b")).contains("wait"));
  const auto here = job.service.gather(job.now);
  ASSERT_TRUE(here);
  EXPECT_EQ(here->workers, 4);
  EXPECT_EQ(here->least, 4);
  const NodeWelcome there = welcome_from(job.join(Job::introduction(1, "b")).at("welcome"));
  EXPECT_EQ(there.first_rank, 2);
  EXPECT_EQ(there.lease, 1000ms);
}

TEST(CoordinatorService, BeginsWithFewerAfterAWhile) {
  Job job(3, 2);
  job.join(Job::introduction(2, "c"));
  EXPECT_FALSE(job.service.gather(job.now));
  for (int i = 0; i < 60; ++i, job.now += 100ms) job.join(Job::introduction(2, "c"));
  const auto here = job.service.gather(job.now);
  ASSERT_TRUE(here);
  EXPECT_EQ(here->nodes, 2);
  EXPECT_EQ(here->least, 4);
  EXPECT_EQ(here->most, 6);
}

TEST(CoordinatorService, RefusesWhoDoesNotFit) {
  Job job(2, 2);
  EXPECT_THROW(job.join(Job::introduction(2, "b")), ConfigError);
  NodeIntroduction other = Job::introduction(1, "b");
  other.same["program"] = "./other";
  EXPECT_THROW(job.join(other), ConfigError);
  EXPECT_THAT(job.events.back().at("text"), HasSubstr("./other there, ./it here"));
  job.join(Job::introduction(1, "b"));
  EXPECT_THAT(job.join(Job::introduction(1, "x")).at("wait"), HasSubstr("is here already"));
}

TEST(CoordinatorService, RanksAreContiguousByNodeAndALostNodeIsNamed) {
  Job job(2, 1);
  job.begin();
  job.start();
  const GenerationPtr first = job.service.generation();
  ASSERT_TRUE(first);
  EXPECT_EQ(first->members.size(), 4u);
  EXPECT_TRUE(std::ranges::is_sorted(first->members, {}, &Member::node));
  for (int i = 0; i < 16; ++i, job.now += 100ms) job.decide();
  EXPECT_THAT(job.service.generation()->reason,
              HasSubstr("rank 2 (pid 100 on node 1) lost: node 1 (host1) is silent for 1.5 s"));
  EXPECT_THAT(job.service.lost_nodes(), testing::ElementsAre(HasSubstr("node 1 (host1)")));
  EXPECT_TRUE(job.ask("report", {{"report", to_json(job.there->report(job.now))},
                                 {"published", 0},
                                 {"first", 0},
                                 {"events", json::array()}})
                  .contains("unknown"));
  // It comes back as another one; the program must have said that it can take it in.
  const NodeIntroduction again = Job::introduction(1, "b", job.there->report(job.now).node);
  EXPECT_TRUE(job.join(again).contains("wait"));
  job.service.set_elastic();
  EXPECT_NE(welcome_from(job.join(again).at("welcome")).node, again.after);
}

TEST(CoordinatorService, AClosedConnectionIsALossSoonUnlessItComesBack) {
  Job job(2, 1);
  job.begin();
  job.start();
  job.service.disconnected(7, job.now);
  job.now += 200ms;
  job.connection = 8;
  job.report();
  job.now += 200ms;
  job.decide();
  EXPECT_EQ(job.service.generation()->number, 0u);
  job.service.disconnected(8, job.now);
  job.report();  // was on the way
  job.now += 301ms;
  job.decide();
  EXPECT_THAT(job.service.generation()->reason, HasSubstr("the connection to node 1 (host1) has"));
}

TEST(CoordinatorService, WhoStoodStillItselfBlamesNobody) {
  Job job(2, 1);
  job.begin();
  job.start();
  job.now += 10s;
  job.decide();
  EXPECT_EQ(job.service.generation()->number, 0u);
}

// Whoever has a rank later, on another node or on this one after it was given up.
TEST(CoordinatorService, WhatHasStruckIsToldToTheOtherNodes) {
  Job job(2, 1);
  const int life = job.begin().node;
  job.service.struck({{"event", "injected"}, {"fault", "here"}});
  const json event{{"event", "injected"}, {"rank", 2}, {"fault", "there"}};
  const json said{{"report", to_json(job.there->report(job.now))},
                  {"published", 0},
                  {"first", 0},
                  {"events", {{{"rank", 2}, {"event", event}}}}};
  EXPECT_EQ(job.ask("report", said).at("struck"), json::array({"here"}));
  EXPECT_THAT(job.service.struck_elsewhere(), testing::ElementsAre("there"));
  EXPECT_THAT(job.service.struck_elsewhere(life + 2), testing::ElementsAre("here", "there"));
}

TEST(CoordinatorService, EventsCountOnce) {
  Job job(2, 2);
  job.begin();
  const json event{{"event", "message"}, {"text", "x"}, {"clock", 1}};
  const json more{{"events", {{{"rank", 2}, {"event", event}}, {{"rank", "x"}}}}};
  job.report(more);
  job.report(more);
  const auto events = job.service.events();
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].rank, 2);
  EXPECT_EQ(events[0].event.at("clock"), 1000.0);  // of this node's clock
}

}  // namespace
}  // namespace lockstep
