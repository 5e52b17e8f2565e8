#include "lockstep/tools/doctor_meeting.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

// Options of nodes that meet on a port of this machine that was free a moment ago.
class DoctorMeetingTest : public ::testing::Test {
 protected:
  static std::string free_address() {
    const ControlServer server({});
    return server.endpoint().substr(std::string("tcp://").size());
  }
  MeetingOptions node(int number, int nodes, Clock::duration patience = 60s) const {
    return {nodes, number, (number == 0 ? "" : "tcp://") + address_, key_, patience};
  }
  const ControlKey key_ = make_control_key();
  const std::string address_ = free_address();
};

TEST_F(DoctorMeetingTest, AllGetWhatAllBring) {
  std::vector<std::future<std::vector<json>>> nodes;
  for (int number = 0; number < 3; ++number)
    nodes.push_back(std::async(std::launch::async, [&, number] {
      Meeting meeting(node(number, 3));
      const ClockSkew skew = meeting.clock_skew();  // of one clock against itself
      EXPECT_LE(std::abs(skew.seconds), skew.uncertainty_s + 1e-6);
      EXPECT_EQ(meeting.gather(number), (std::vector<json>{0, 1, 2}));
      return meeting.gather({{"mine", number}});
    }));
  const std::vector<json> wanted = {{{"mine", 0}}, {{"mine", 1}}, {{"mine", 2}}};
  for (auto& one : nodes) EXPECT_EQ(one.get(), wanted);
}

TEST_F(DoctorMeetingTest, WhoDoesNotComeIsNamed) {
  Meeting alone(node(0, 3, 100ms));
  EXPECT_THAT([&] { alone.gather(1); },
              ThrowsMessage<CommError>(HasSubstr("node 1, 2 did not come to " + address_)));
  Meeting late(node(1, 3, 100ms));
}

TEST_F(DoctorMeetingTest, NodesThatContradictEachOtherAreToldSo) {
  Meeting first(node(0, 2, 20s));
  const auto refused = [&](const MeetingOptions& options, const char* says) {
    Meeting meeting(options);
    EXPECT_THAT([&] { meeting.gather(1); }, ThrowsMessage<ConfigError>(HasSubstr(says)));
  };
  refused(node(1, 3), "node 1 was started with --nnodes 3, node 0 with --nnodes 2");
  refused(node(2, 2), "node 2 is none of 2");
  Meeting second(node(1, 2));
  auto done = std::async(std::launch::async, [&] { return second.gather(1); });
  first.gather(0);
  done.get();
  refused(node(1, 2), "two were started as node 1; hint: --node-rank");
}

}  // namespace
}  // namespace lockstep
