// Real sockets on loopback: a server in a loop of its own, as the agent has one, and clients.
#include "lockstep/cluster/control.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>
#include <zmq.hpp>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/cluster/control_message.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

constexpr auto kSoon = 20s;  // what comes at once, on a loaded machine

template <typename Kind, typename Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Kind& error) {
    return error.what();
  }
  return "nothing was thrown";
}

// Answers "echo" with its arguments, in a thread that sleeps in poll().
class Server {
 public:
  explicit Server(ControlServerOptions options = {})
      : server_(options), end_(::eventfd(0, EFD_CLOEXEC)), thread_([this] { serve(); }) {}
  ~Server() {
    ::eventfd_write(end_.get(), 1);
    thread_.join();
  }
  ControlTarget target() const {
    return {server_.endpoint(), server_.key().server.public_key, server_.key().client};
  }
  const ControlKey& key() const { return server_.key(); }
  const std::string& endpoint() const { return server_.endpoint(); }
  int answered() const { return answered_; }

 private:
  void serve() {
    pollfd watched[] = {{server_.fd(), POLLIN, 0}, {end_.get(), POLLIN, 0}};
    while (watched[1].revents == 0) {
      ::poll(watched, 2, -1);
      server_.handle([this](const ControlRequest& request, const ControlPeer&) -> json {
        ++answered_;
        if (request.action == "echo") return request.arguments;
        if (request.action == "fail") throw Error("it broke");
        if (request.action == "long") return {{"text", std::string(kMaxControlBytes, 'x')}};
        throw ConfigError("no such thing", "echo");
      });
    }
  }

  ControlServer server_;
  UniqueFd end_;
  std::atomic<int> answered_{0};
  std::thread thread_;
};

json echo(ControlClient& client, const json& arguments) {
  return client.request("echo", arguments, Deadline::after(kSoon));
}

// A plain connection; what ZeroMQ's protocol is not.
UniqueFd connect_to(const std::string& endpoint) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const std::string port = endpoint.substr(endpoint.rfind(':') + 1);
  int number = 0;
  std::from_chars(port.data(), port.data() + port.size(), number);
  address.sin_port = htons(static_cast<std::uint16_t>(number));
  EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  return fd;
}

// Reads until the other side closes; what came.
std::string read_to_end(int fd) {
  std::string all;
  char bytes[4096];
  pollfd watched{fd, POLLIN, 0};
  while (::poll(&watched, 1, 20'000) > 0) {
    const ssize_t count = ::read(fd, bytes, sizeof bytes);
    if (count <= 0) return all;
    all.append(bytes, static_cast<std::size_t>(count));
  }
  ADD_FAILURE() << "the connection was not closed";
  return all;
}

TEST(Control, RequestsAreAnswered) {
  Server server;
  EXPECT_THAT(server.endpoint(), testing::StartsWith("tcp://127.0.0.1:"));
  ControlClient client(server.target());
  for (int i = 0; i < 100; ++i) EXPECT_EQ(echo(client, {{"i", i}}), json({{"i", i}}));
  ControlClient second(server.target());
  EXPECT_EQ(echo(second, {{"text", "grün"}})["text"], "grün");
}

TEST(Control, ManyRequestsAtOnceAndTheirReplies) {
  Server server;
  ControlClient client(server.target());
  echo(client, json::object());  // connected
  constexpr std::uint64_t kFirst = 1000, kLast = 1050;
  for (std::uint64_t id = kFirst; id < kLast; ++id)
    ASSERT_TRUE(client.send({id, "echo", {{"text", std::string(id, 'x')}}}));
  std::uint64_t next = kFirst;
  while (next < kLast) {
    for (const ControlReply& reply : client.drain()) {
      ASSERT_EQ(reply.id, next);
      EXPECT_EQ(reply.result["text"].get<std::string>().size(), next);
      ++next;
    }
    pollfd watched{client.fd(), POLLIN, 0};
    if (next == kLast) break;
    ASSERT_EQ(::poll(&watched, 1, 20'000), 1);
  }
}

TEST(Control, FailuresAreToldAsTheyWere) {
  Server server;
  ControlClient client(server.target());
  const auto ask = [&](const char* action) {
    client.request(action, json::object(), Deadline::after(kSoon));
  };
  EXPECT_EQ(message_of<ConfigError>([&] { ask("what"); }), "no such thing; hint: echo");
  EXPECT_EQ(message_of<Error>([&] { ask("fail"); }), "it broke");
  EXPECT_EQ(message_of<Error>([&] { ask("long"); }), "the answer is too long");
  const std::string large(kMaxControlBytes, 'x');
  EXPECT_THAT(message_of<Error>([&] { echo(client, {{"text", large}}); }), HasSubstr("larger"));
  EXPECT_EQ(echo(client, {{"i", 1}})["i"], 1);  // and nothing broke
}

TEST(Control, NobodyAnswersInTime) {
  ControlServer busy({});  // handles nothing, as a stopped agent
  ControlClient client({busy.endpoint(), busy.key().server.public_key, busy.key().client});
  EXPECT_THAT(message_of<CommError>(
                  [&] { client.request("echo", json::object(), Deadline::after(300ms)); }),
              HasSubstr("no answer to 'echo' from " + busy.endpoint() + " in time"));
}

TEST(Control, NobodyListens) {
  ControlTarget target;
  {
    Server server;
    target = server.target();
  }
  ControlClient client(target);
  EXPECT_THAT(message_of<CommError>(
                  [&] { client.request("echo", json::object(), Deadline::after(300ms)); }),
              HasSubstr("nobody listens there"));
}

TEST(Control, AClientOutlivesItsServer) {
  const ControlKey key = make_control_key();
  auto first = std::make_unique<Server>(ControlServerOptions{.key = key});
  const std::string address = first->endpoint().substr(6);
  ControlClient client(first->target());
  EXPECT_EQ(echo(client, {{"i", 1}})["i"], 1);
  first.reset();
  Server second({.address = address, .key = key});
  EXPECT_EQ(echo(client, {{"i", 2}})["i"], 2);
}

TEST(Control, AnotherKeyIsRefused) {
  Server server;
  ControlTarget target = server.target();
  target.client = make_curve_pair();
  ControlClient wrong_client(target);
  EXPECT_THAT(message_of<CommError>([&] { echo(wrong_client, json::object()); }),
              HasSubstr("refuses this key"));
  target = server.target();
  target.server_public = make_curve_pair().public_key;
  ControlClient wrong_server(target);
  EXPECT_THAT(message_of<CommError>([&] { echo(wrong_server, json::object()); }),
              HasSubstr("breaks off every handshake"));
  EXPECT_EQ(server.answered(), 0);
  ControlClient right(server.target());
  EXPECT_EQ(echo(right, {{"i", 3}})["i"], 3);
}

// ZeroMQ's own client, and what becomes of its connections.
class PlainClient {
 public:
  explicit PlainClient(const ControlTarget& target, bool encrypted)
      : socket(context_, zmq::socket_type::dealer), monitor_(context_, zmq::socket_type::pair) {
    socket.set(zmq::sockopt::linger, 0);
    socket.set(zmq::sockopt::rcvtimeo, 20'000);
    monitor_.set(zmq::sockopt::rcvtimeo, 20'000);
    EXPECT_EQ(::zmq_socket_monitor(socket.handle(), "inproc://watch", ZMQ_EVENT_ALL), 0);
    monitor_.connect("inproc://watch");
    if (encrypted) {
      socket.set(zmq::sockopt::curve_serverkey, target.server_public);
      socket.set(zmq::sockopt::curve_publickey, target.client.public_key);
      socket.set(zmq::sockopt::curve_secretkey, target.client.secret_key);
    }
    socket.connect(target.endpoint);
  }
  // Waits for an event of this kind; false if `other` comes before.
  bool sees(int kind, int other = 0) {
    for (;;) {
      zmq::message_t event, address;
      if (!monitor_.recv(event) || !monitor_.recv(address)) return false;
      const int seen = *event.data<std::uint16_t>();
      if (seen == kind || seen == other) return seen == kind;
    }
  }
  ControlReply ask(const std::string& text) {
    socket.send(zmq::buffer(text));
    zmq::message_t reply;
    EXPECT_TRUE(socket.recv(reply));
    return parse_reply(reply.to_string());
  }

 private:
  zmq::context_t context_;

 public:
  zmq::socket_t socket;

 private:
  zmq::socket_t monitor_;
};

constexpr const char* kEcho = R"({"lockstep":1,"id":7,"action":"echo","arguments":{}})";

TEST(Control, WithoutEncryptionNobodyGetsIn) {
  Server server;
  PlainClient plain(server.target(), /*encrypted=*/false);
  plain.socket.send(zmq::buffer(std::string(kEcho)));
  EXPECT_TRUE(plain.sees(ZMQ_EVENT_DISCONNECTED, ZMQ_EVENT_HANDSHAKE_SUCCEEDED));
  EXPECT_EQ(server.answered(), 0);
  ControlClient right(server.target());
  EXPECT_EQ(echo(right, {{"i", 3}})["i"], 3);
}

TEST(Control, AClientOfSomethingElse) {
  zmq::context_t context;
  zmq::socket_t other(context, zmq::socket_type::router);  // no encryption
  other.set(zmq::sockopt::linger, 0);
  other.bind("tcp://127.0.0.1:*");
  ControlClient client(
      {other.get(zmq::sockopt::last_endpoint), make_curve_pair().public_key, make_curve_pair()});
  EXPECT_THAT(message_of<CommError>([&] { echo(client, json::object()); }),
              HasSubstr("breaks off every handshake"));
}

TEST(Control, GarbageGetsNothing) {
  Server server;
  std::string greeting(
      "\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01"
      "CURVE",
      17);
  greeting.resize(64, '\0');
  for (const std::string& bytes :
       {std::string("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), std::string(100'000, '\xff'),
        std::string(100'000, '\0'), greeting + std::string(500, '\x04'),
        greeting + std::string("\x06\xff\xff\xff\xff\xff\xff\xff\xff", 9) +
            std::string(500, 'x')}) {
    const UniqueFd fd = connect_to(server.endpoint());
    ::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    ::shutdown(fd.get(), SHUT_WR);
    EXPECT_LE(read_to_end(fd.get()).size(), 128u);  // no more than a greeting
  }
  EXPECT_EQ(server.answered(), 0);
  ControlClient right(server.target());
  EXPECT_EQ(echo(right, {{"i", 3}})["i"], 3);
}

TEST(Control, WhoSaysNothingIsShutOut) {
  Server server;
  const UniqueFd fd = connect_to(server.endpoint());
  EXPECT_LE(read_to_end(fd.get()).size(), 128u);  // returns, once a handshake has lasted too long
}

TEST(Control, ConnectionsAreBounded) {
  Server server({.most_connections = 1});
  PlainClient client(server.target(), /*encrypted=*/true);
  EXPECT_EQ(client.ask(kEcho).id, 7u);
  const UniqueFd one_more = connect_to(server.endpoint());
  EXPECT_TRUE(client.sees(ZMQ_EVENT_DISCONNECTED));
  EXPECT_LE(read_to_end(one_more.get()).size(), 128u);
  EXPECT_TRUE(client.sees(ZMQ_EVENT_HANDSHAKE_SUCCEEDED));  // it has come back
  EXPECT_EQ(client.ask(kEcho).id, 7u);
}

TEST(Control, MessagesThatCannotBeRead) {
  Server server;
  PlainClient client(server.target(), /*encrypted=*/true);
  EXPECT_THAT(client.ask("").error, HasSubstr("no JSON object"));
  EXPECT_THAT(client.ask("\xff\xfe").error, HasSubstr("no JSON object"));
  EXPECT_THAT(client.ask(std::string(100'000, '[')).error, HasSubstr("too deeply"));
  EXPECT_THAT(client.ask(R"({"lockstep":2,"id":1})").error, HasSubstr("its version is 2"));
  EXPECT_EQ(client.ask(kEcho).id, 7u);
  EXPECT_EQ(server.answered(), 1);
  // Parts that nobody expects are not answered; a message that is too long ends the connection.
  client.socket.send(zmq::str_buffer("a"), zmq::send_flags::sndmore);
  client.socket.send(zmq::str_buffer("b"));
  client.socket.send(zmq::buffer(std::string(kMaxControlBytes + 1, ' ')));
  EXPECT_TRUE(client.sees(ZMQ_EVENT_DISCONNECTED));
  ControlClient right(server.target());
  EXPECT_EQ(echo(right, {{"i", 3}})["i"], 3);
  EXPECT_EQ(server.answered(), 2);
}

TEST(Control, Addresses) {
  const auto refusal = [](const std::string& address) {
    return message_of<ConfigError>([&] { ControlServer server({.address = address}); });
  };
  for (const char* address : {"0.0.0.0", "192.0.2.1:80"})
    EXPECT_THAT(refusal(address), AllOf(HasSubstr("there is no key"), HasSubstr("--key-file")));
  for (const char* address : {"", ":", ":80", "::1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1",
                              "127.0.0.1:99999", "127.0.0.1:1:2", "300.0.0.1"})
    EXPECT_THAT(refusal(address), HasSubstr("hint: an IPv4 address")) << address;
  const ControlKey key = make_control_key();
  EXPECT_THAT(
      message_of<ConfigError>([&] { ControlServer server({.address = "192.0.2.1", .key = key}); }),
      HasSubstr("Cannot assign requested address"));
  Server everywhere({.address = "0.0.0.0", .key = key});
  EXPECT_THAT(everywhere.endpoint(), testing::StartsWith("tcp://127.0.0.1:"));
  ControlClient client(everywhere.target());
  EXPECT_EQ(echo(client, {{"i", 1}})["i"], 1);
  EXPECT_THAT(message_of<ConfigError>([&] {
                ControlServer server({.address = everywhere.endpoint().substr(6), .key = key});
              }),
              HasSubstr("Address already in use"));
}

std::set<int> descriptors() {
  std::set<int> open;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    open.insert(std::stoi(entry.path().filename()));
  return open;
}

TEST(Control, DescriptorsCloseOnExecAndAtTheEnd) {
  const std::set<int> before = descriptors();
  {
    Server server;
    ControlClient client(server.target());
    echo(client, json::object());
    int ours = 0;
    for (const int fd : descriptors()) {
      const int flags = ::fcntl(fd, F_GETFD);
      if (before.contains(fd) || flags < 0) continue;
      ++ours;
      EXPECT_NE(flags & FD_CLOEXEC, 0)
          << std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd));
    }
    EXPECT_GT(ours, 10);
  }
  EXPECT_EQ(descriptors(), before);
}

}  // namespace
}  // namespace lockstep
