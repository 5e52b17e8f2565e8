#include "lockstep/cluster/job_commands.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"

namespace lockstep {
namespace {

using nlohmann::json;
using testing::HasSubstr;

struct Fake : ControlHandler {
  JobStatus status() override { return state; }
  void scale(int workers) override { state.wanted = workers; }
  void stop() override { stopped = true; }
  JobStatus state{.workers = 2, .wanted = 2, .least = 1, .most = 4, .generation = 3};
  bool stopped = false;
};

std::string refusal(Fake& job, const std::string& action, const json& arguments) {
  try {
    answer_command(job, {1, action, arguments});
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(JobCommands, WhatTheHandlerIsAsked) {
  Fake job;
  job.state.first_step = 117;
  const json status = answer_command(job, {1, "status", json::object()});
  EXPECT_EQ(status, json({{"workers", 2},
                          {"wanted", 2},
                          {"least", 1},
                          {"most", 4},
                          {"generation", 3},
                          {"first_step", 117},
                          {"step", nullptr},
                          {"reason", ""}}));
  EXPECT_EQ(answer_command(job, {2, "scale", {{"workers", 4}}})["wanted"], 4);
  EXPECT_EQ(job.state.wanted, 4);
  EXPECT_FALSE(job.stopped);
  EXPECT_EQ(answer_command(job, {3, "stop", json::object()}), json::object());
  EXPECT_TRUE(job.stopped);
}

TEST(JobCommands, WhatIsRefused) {
  Fake job;
  EXPECT_EQ(refusal(job, "scale", {{"workers", 5}}),
            "5 workers: this job has 1 to 4; hint: its --workers MIN:MAX says so");
  EXPECT_THAT(refusal(job, "scale", {{"workers", 0}}), HasSubstr("this job has 1 to 4"));
  EXPECT_THAT(refusal(job, "scale", {{"workers", -1}}), HasSubstr("no whole number 'workers'"));
  EXPECT_THAT(refusal(job, "scale", {{"workers", 1ull << 40}}), HasSubstr("too large"));
  EXPECT_THAT(refusal(job, "scale", json::object()), HasSubstr("no whole number 'workers'"));
  EXPECT_THAT(refusal(job, "sing", json::object()), HasSubstr("there is no action 'sing'"));
  EXPECT_EQ(job.state.wanted, 2);
  job.state.least = job.state.most = 2;
  EXPECT_THAT(refusal(job, "scale", {{"workers", 2}}), HasSubstr("always has 2 workers"));
}

}  // namespace
}  // namespace lockstep
