#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/cluster/console.h"
#include "lockstep/cluster/control.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/cluster/control_socket.h"

namespace lockstep {
namespace {

constexpr int kReconnectMs = 50, kLongestReconnectMs = 1000;
constexpr auto kResend = std::chrono::seconds(1);
constexpr auto kRetry = std::chrono::milliseconds(100);  // to send, while there is no connection
constexpr int kBrokenHandshakes = 5;
constexpr int kWatched = ZMQ_EVENT_CONNECTED | ZMQ_EVENT_CLOSED | ZMQ_EVENT_DISCONNECTED |
                         ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
                         ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;

nlohmann::json result_of(ControlReply reply) {
  if (reply.error.empty()) return std::move(reply.result);
  if (reply.bad_input) throw ConfigError(reply.error);
  throw Error(reply.error);
}

}  // namespace

struct ControlClient::State {
  explicit State(const ControlTarget& target);
  void follow_connection();

  std::string endpoint;
  MonitoredSocket channel;  // a DEALER
  std::uint64_t last_id = 0;
  const char* condition = "not connected yet";
  int broken_handshakes = 0;  // in a row
};

ControlClient::State::State(const ControlTarget& target)
    : endpoint(target.endpoint), channel(zmq::socket_type::dealer, kWatched, 0) {
  zmq::socket_t& socket = channel.socket;
  socket.set(zmq::sockopt::immediate, true);  // nothing is kept for a connection to come
  socket.set(zmq::sockopt::reconnect_ivl, kReconnectMs);
  socket.set(zmq::sockopt::reconnect_ivl_max, kLongestReconnectMs);
  socket.set(zmq::sockopt::curve_serverkey, target.server_public);
  socket.set(zmq::sockopt::curve_publickey, target.client.public_key);
  socket.set(zmq::sockopt::curve_secretkey, target.client.secret_key);
  socket.connect(endpoint);
}

void ControlClient::State::follow_connection() {
  for (const MonitoredSocket::Event& event : channel.events()) {
    switch (event.kind) {
      case ZMQ_EVENT_CONNECTED:
        condition = "connected, but not admitted";
        break;
      case ZMQ_EVENT_CLOSED:
        condition = "nobody listens there";
        break;
      case ZMQ_EVENT_DISCONNECTED:
        condition = "the connection broke";
        break;
      case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
        condition = "connected";
        broken_handshakes = 0;
        break;
      case ZMQ_EVENT_HANDSHAKE_FAILED_AUTH:
        throw CommError(fmt::format("{} refuses this key: it is another job's", endpoint));
      case ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL:  // ZeroMQ does not try again after that
        broken_handshakes = kBrokenHandshakes;
        break;
      default:
        ++broken_handshakes;
    }
  }
  if (broken_handshakes >= kBrokenHandshakes)
    throw CommError(
        fmt::format("{} breaks off every handshake: it is another job's, or none", endpoint));
}

ControlClient::ControlClient(const ControlTarget& target) {
  try {
    state_ = std::make_unique<State>(target);
  } catch (const zmq::error_t& error) {
    throw Error(fmt::format("cannot connect to {}: {}", target.endpoint, error.what()));
  }
}
ControlClient::~ControlClient() = default;

int ControlClient::fd() const { return state_->channel.fd(); }

bool ControlClient::send(const ControlRequest& request) {
  const std::string text = encode(request);
  if (text.size() > kMaxControlBytes)
    throw Error(fmt::format("a control message of {} bytes is larger than the {} allowed",
                            text.size(), kMaxControlBytes));
  return lockstep::send(state_->channel.socket, {text});
}

std::vector<ControlReply> ControlClient::drain() {
  state_->follow_connection();
  std::vector<ControlReply> replies;
  while (readable(state_->channel.socket)) {
    const std::vector<std::string> message = receive(state_->channel.socket);
    if (message.size() == 1) replies.push_back(parse_reply(message[0]));
  }
  return replies;
}

nlohmann::json ControlClient::request(const std::string& action, const nlohmann::json& arguments,
                                      const Deadline& deadline) {
  const ControlRequest request{++state_->last_id, action, arguments};
  Deadline resend = Deadline::after({});
  for (;;) {
    if (resend.expired() && send(request)) resend = Deadline::after(kResend);
    for (ControlReply& reply : drain())
      if (reply.id == request.id || reply.id == 0) return result_of(std::move(reply));
    if (deadline.expired())
      throw CommError(fmt::format("no answer to '{}' from {} in time ({})", action,
                                  state_->endpoint, state_->condition));
    const Clock::duration pause = resend.expired() ? kRetry : resend.remaining();
    pollfd watched{fd(), POLLIN, 0};
    ::poll(&watched, 1, poll_timeout_ms(Deadline::after(std::min(deadline.remaining(), pause))));
  }
}

}  // namespace lockstep
