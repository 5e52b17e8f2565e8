// A node's way to node 0 over a real connection; time is told, and runs ahead.
#include "lockstep/cluster/coordinator_link.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <string>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/cluster/membership_wire.h"

namespace lockstep {
namespace {

using nlohmann::json;

// Joins, says that it leaves if it does, and finds that nobody listens any more; what it says then.
std::string end_of_node_0(bool leaves) {
  auto server = std::make_unique<ControlServer>(ControlServerOptions{});
  const ControlTarget target{server->endpoint(), server->key().server.public_key,
                             server->key().client};
  Clock::time_point now = Clock::now();
  CoordinatorLink link(target, {.rank = 1, .host = "host1", .agent = "a", .same = {}}, now);
  const auto look = [&](int fd) {
    pollfd ready{fd, POLLIN, 0};
    ::poll(&ready, 1, 10);
  };
  for (const Deadline deadline = Deadline::after(std::chrono::seconds(20)); !link.joined();) {
    if (deadline.expired()) return "it could not join";
    link.receive(Clock::now());
    look(server->fd());
    server->handle([](const ControlRequest&, const ControlPeer&) -> json {
      return {{"welcome", to_json(NodeWelcome{.node = 1, .nodes = 2})}};
    });
    look(link.fd());
  }
  NodeReport report;
  report.node = 1;
  link.report(report, now, leaves);
  link.receive(Clock::now());
  server.reset();
  try {
    for (int i = 0; i < 20 && !link.left(); ++i) link.receive(now += std::chrono::seconds(1));
  } catch (const CommError& error) {
    return error.what();
  }
  return link.left() ? "left" : "neither";
}

TEST(CoordinatorLink, TheEndOfNode0IsAnErrorUnlessThisNodeHasLeft) {
  EXPECT_EQ(end_of_node_0(true), "left");
  const std::string error = end_of_node_0(false);
  EXPECT_NE(error.find("node 0 has ended: nobody listens at tcp://127.0.0.1:"), std::string::npos)
      << error;
}

}  // namespace
}  // namespace lockstep
