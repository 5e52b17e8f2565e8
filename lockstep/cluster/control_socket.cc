#include "lockstep/cluster/control_socket.h"

#include <sys/epoll.h>

#include <cerrno>
#include <cstring>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"

namespace lockstep {
namespace {

// A machine that is silent for so long is gone. The kernel asks, not ZeroMQ: its heartbeats abort
// the process where a peer leaves a socket that is closing (stream_engine_base.cpp, 4.3.4 and .5).
constexpr int kAskAfterS = 1, kAskEveryS = 1, kAsk = 1, kSilenceMs = 2000;
constexpr int kHandshakeMs = 2000;
constexpr int kMostWaiting = 100;  // messages, each way and connection
constexpr const char* kMonitor = "inproc://monitor";

}  // namespace

bool readable(zmq::socket_t& socket) {
  for (;;) {
    int events = 0;
    std::size_t size = sizeof events;
    if (::zmq_getsockopt(socket.handle(), ZMQ_EVENTS, &events, &size) == 0)
      return (events & ZMQ_POLLIN) != 0;
    if (errno != EINTR) throw zmq::error_t();
  }
}

std::vector<std::string> receive(zmq::socket_t& socket, int* connection) {
  std::vector<std::string> parts;
  zmq::message_t part;
  do {
    if (!socket.recv(part, zmq::recv_flags::dontwait)) break;
    if (connection != nullptr) *connection = ::zmq_msg_get(part.handle(), ZMQ_SRCFD);
    if (parts.size() < kMostParts) parts.push_back(part.to_string());
  } while (part.more());
  return parts;
}

bool send(zmq::socket_t& socket, const std::vector<std::string>& parts) {
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const bool more = i + 1 < parts.size();
    if (!socket.send(
            zmq::buffer(parts[i]),
            zmq::send_flags::dontwait | (more ? zmq::send_flags::sndmore : zmq::send_flags::none)))
      return false;  // the first: ZeroMQ takes a message whole
  }
  return true;
}

MonitoredSocket::MonitoredSocket(zmq::socket_type type, int events, int linger_ms)
    : socket(context, type), monitor_(context, zmq::socket_type::pair) {
  socket.set(zmq::sockopt::linger, linger_ms);
  socket.set(zmq::sockopt::maxmsgsize, static_cast<std::int64_t>(kMaxControlBytes));
  socket.set(zmq::sockopt::tcp_keepalive, 1);
  socket.set(zmq::sockopt::tcp_keepalive_idle, kAskAfterS);
  socket.set(zmq::sockopt::tcp_keepalive_intvl, kAskEveryS);
  socket.set(zmq::sockopt::tcp_keepalive_cnt, kAsk);
  socket.set(zmq::sockopt::tcp_maxrt, kSilenceMs);  // for what was sent and not acknowledged
  socket.set(zmq::sockopt::handshake_ivl, kHandshakeMs);
  socket.set(zmq::sockopt::sndhwm, kMostWaiting);
  socket.set(zmq::sockopt::rcvhwm, kMostWaiting);
  if (::zmq_socket_monitor(socket.handle(), kMonitor, events) != 0) throw zmq::error_t();
  monitor_.set(zmq::sockopt::linger, 0);
  monitor_.set(zmq::sockopt::rcvhwm, 0);  // ZeroMQ's thread waits for nobody
  monitor_.connect(kMonitor);
  epoll_ = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
  watch(socket);
  watch(monitor_);
}

void MonitoredSocket::watch(zmq::socket_t& watched) {
  epoll_event event{};
  event.events = EPOLLIN;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, watched.get(zmq::sockopt::fd), &event) != 0)
    throw Error("cannot watch the control channel: " + errno_text(errno));
}

std::vector<MonitoredSocket::Event> MonitoredSocket::events() {
  std::vector<Event> events;
  while (readable(monitor_)) {
    const std::vector<std::string> parts = receive(monitor_);
    std::uint16_t kind = 0;
    std::uint32_t number = 0;
    if (parts.empty() || parts[0].size() != sizeof kind + sizeof number) continue;
    std::memcpy(&kind, parts[0].data(), sizeof kind);  // in the machine's own byte order
    std::memcpy(&number, parts[0].data() + sizeof kind, sizeof number);
    events.push_back({kind, static_cast<int>(number)});
  }
  return events;
}

}  // namespace lockstep
