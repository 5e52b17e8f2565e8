// What ControlServer and ControlClient share: a ZeroMQ socket with its monitor, and descriptors to
// wait on. For their .cc files alone. One thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "lockstep/base/file.h"

namespace lockstep {

inline constexpr std::size_t kMostParts = 8;

// Is there a message? Takes in what ZeroMQ's threads have to say, which resets its descriptor:
// that is readable only until then, so that a reader goes on until this says no, and asks again
// after every other call on the socket.
bool readable(zmq::socket_t& socket);
// A message's parts, the first kMostParts of them; none if there is none. `connection`: the
// descriptor that it came by.
std::vector<std::string> receive(zmq::socket_t& socket, int* connection = nullptr);
// The parts as one message, unless that would have to wait.
bool send(zmq::socket_t& socket, const std::vector<std::string>& parts);

class MonitoredSocket {
 public:
  // events: ZMQ_EVENT_…; drops what is unsent `linger_ms` after the end.
  MonitoredSocket(zmq::socket_type type, int events, int linger_ms);

  struct Event {
    int kind = 0;    // ZMQ_EVENT_…
    int number = 0;  // its value: a descriptor, a status
  };
  std::vector<Event> events();  // since the last call

  void watch(zmq::socket_t& socket);  // for fd()
  int fd() const { return epoll_.get(); }

  zmq::context_t context{1};  // first: ended last
  zmq::socket_t socket;

 private:
  zmq::socket_t monitor_;
  UniqueFd epoll_;
};

}  // namespace lockstep
