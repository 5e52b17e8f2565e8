#include "lockstep/cluster/membership_wire.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/cluster/job_nodes.h"

namespace lockstep {
namespace {

using nlohmann::json;

NodeReport report() {
  auto generation = std::make_shared<JobGeneration>();
  generation->number = 3;
  generation->members = {{0, 1, 2, 77, "here"}, {5, 0, 1, 78, "there"}};
  generation->leaving = {{5, 2, 0, 79, ""}};
  generation->over = 2;
  generation->reason = "somebody died";
  NodeReport report;
  report.node = 5;
  report.rank = 1;
  report.host = "beta";
  report.version = 9;
  report.room = 3;
  report.started = 4;
  report.workers = {
      {.seat = 0, .incarnation = 1, .pid = 78, .state = WorkerState::ready, .listed = 3},
      {.seat = 2,
       .incarnation = 3,
       .pid = 80,
       .state = WorkerState::failed,
       .cause = "killed",
       .failed_for_good = true,
       .comm_error = 2,
       .message = "broken",
       .address = "there"}};
  report.generation = generation;
  report.committed = 12;
  report.taken_up = 2;
  return report;
}

TEST(MembershipWire, WhatIsReadIsWhatWasWritten) {
  const json sent = to_json(report());
  const NodeReport read = node_report_from(json::parse(sent.dump()));
  EXPECT_EQ(to_json(read), sent);
  EXPECT_EQ(read.workers[1].cause, "killed");
  EXPECT_EQ(read.workers[1].comm_error, 2u);
  EXPECT_EQ(read.generation->members[1].address, "there");
  Assignment assignment{.term = 1,
                        .acknowledged = 2,
                        .generation = read.generation,
                        .over = 3,
                        .start = 4,
                        .kill = {1, 3},
                        .taken_up = 2,
                        .end = JobEnd{true, "done"}};
  EXPECT_EQ(to_json(assignment_from(to_json(assignment))), to_json(assignment));
}

// Each member in turn: missing, of another type, and far too large.
TEST(MembershipWire, WhatIsDamagedIsRefused) {
  const json whole = to_json(report());
  for (const auto& [name, value] : whole.items()) {
    json without = whole;
    without.erase(name);
    EXPECT_THROW(node_report_from(without), ConfigError) << name;
    for (const json& wrong : {json(-2), json(1e300), json::array({1}), json(nullptr)}) {
      if (wrong.is_null() && (name == "generation" || name == "taken_up")) continue;  // none
      json other = whole;
      other[name] = wrong;
      EXPECT_THROW(node_report_from(other), ConfigError) << name << " " << wrong;
    }
  }
  json many = whole;
  many["started"] = std::uint64_t{1} << 60;  // nobody is made to count to it
  EXPECT_THROW(node_report_from(many), ConfigError);
  json twice = whole;
  twice["workers"].push_back(twice["workers"][0]);
  EXPECT_THROW(node_report_from(twice), ConfigError);
  json seat = whole;
  seat["workers"][0]["seat"] = 1 << 20;
  EXPECT_THROW(node_report_from(seat), ConfigError);
  json unsorted = whole;
  unsorted["generation"]["members"][0]["node"] = 9;
  EXPECT_THROW(node_report_from(unsorted), ConfigError);
}

TEST(JobNodes, TheFirstDifferenceIsNamed) {
  NodeIntroduction here{.rank = 0, .host = "alpha", .same = {{"job", "lr = 1\nseed = 2\n"}}};
  NodeIntroduction there{.rank = 1, .host = "beta", .same = {{"job", "lr = 1\nseed = 3\n"}}};
  EXPECT_NO_THROW(check_same(here, here));
  try {
    check_same(introduction_from(to_json(there)), here);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(),
                testing::StartsWith("node 1 (beta) has another job than node 0: seed = 3 there, "
                                    "seed = 2 here"));
  }
}

}  // namespace
}  // namespace lockstep
