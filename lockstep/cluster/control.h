// The control channel of a job: requests and replies over ZeroMQ with CURVE, so that every byte is
// encrypted and only clients with the job's key get in. Served by the agent, inside its own event
// loop; used by `lockstep scale`, `status` and `stop`.
//
// Each object owns a ZeroMQ context and with it two threads of ZeroMQ's, which block all signals
// and touch nothing else. One thread uses an object; nothing here may be used in a forked child.
// All descriptors close on exec; a child that does not exec keeps the port taken: fork it before
// the server is made, or have it close what it does not need.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/cluster/control_key.h"

namespace lockstep {

struct ControlRequest;
struct ControlReply;

struct ControlServerOptions {
  std::string address = "127.0.0.1";  // ADDR or ADDR:PORT (IPv4); without a port: a free one
  // Known beforehand; none: made for this server, which then listens on loopback only.
  std::optional<ControlKey> key = {};
  // Connections at once, with and without the key. One more, and all are dropped: those with the
  // key come back by themselves.
  int most_connections = 64;
};

// Who asked: for push(), and to know him again when his connection ends.
struct ControlPeer {
  std::string route;
  int connection = -1;
};

class ControlServer {
 public:
  using Answer =
      std::function<nlohmann::json(const ControlRequest& request, const ControlPeer& peer)>;

  // Throws ConfigError: the address is none, not of this machine, taken, or not loopback and there
  // is no key. Throws Error: the system's.
  explicit ControlServer(const ControlServerOptions& options);
  ~ControlServer();  // waits up to 500 ms for replies under way

  const ControlKey& key() const;
  // "tcp://127.0.0.1:40123", for clients on this node: loopback where it listens everywhere.
  const std::string& endpoint() const;

  int fd() const;  // readable: call handle(). For poll and level-triggered epoll
  // Answers all requests that have come; never waits. `answer` returns the result; a ConfigError
  // or other std::exception that it throws becomes the reply.
  void handle(const Answer& answer);
  // Another answer to a request that was answered: what has changed since. Lost where the
  // connection has ended, or does not take it.
  void push(const ControlPeer& peer, std::uint64_t request, const nlohmann::json& result);
  // The connections that have ended since the last call.
  std::vector<int> ended_connections();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct ControlTarget {
  std::string endpoint;
  std::string server_public;
  CurvePair client;
};

// Connects, and after a break again, by itself.
class ControlClient {
 public:
  explicit ControlClient(const ControlTarget& target);
  ~ControlClient();

  int fd() const;  // readable: call drain(). For poll and level-triggered epoll
  bool send(const ControlRequest& request);  // false: there is no connection now
  // The replies that have come. Throws CommError when the server refuses this client's key, or
  // breaks off one handshake after the other, as one with another key does.
  std::vector<ControlReply> drain();

  // Sends, again when there is no answer, and waits. Throws CommError when none comes in time, and
  // ConfigError or Error as the server's answer says.
  nlohmann::json request(const std::string& action, const nlohmann::json& arguments,
                         const Deadline& deadline);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lockstep
