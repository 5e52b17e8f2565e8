// Peers that are killed, strangers at the door, keys that differ, and the transport with faults.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "lockstep/base/file.h"
#include "lockstep/transport/backends_test.h"
#include "lockstep/transport/faulty_test.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
constexpr std::size_t kSome = 20 << 20;

class Processes : public ::testing::TestWithParam<Engine> {
 protected:
  void SetUp() override {
    if (std::getenv("OMPI_COMM_WORLD_SIZE")) GTEST_SKIP() << "not under mpirun";
    if (const std::string why = unavailable(GetParam()); !why.empty()) GTEST_SKIP() << why;
  }
};
INSTANTIATE_TEST_SUITE_P(Engines, Processes, ::testing::Values(Engine::ucx, Engine::zmq),
                         [](const auto& info) { return std::string(name_of(info.param)); });

// kill -9 in the middle of a transfer: named at once, and the others go on without him.
TEST_P(Processes, AKilledPeerIsNamed) {
  run_processes(
      GetParam(), {.key = "secret"}, 3,
      [](const Member& member) {
        const auto transport = member.connect(1);
        meet(*transport);
        std::vector<std::byte> data(64 << 20);
        if (member.rank == 1) {
          transport->done(transport->receive(0, 0, std::span(data).first(1 << 20)));
          ::raise(SIGKILL);
        }
        int peer = -1;
        const std::string error = error_of(
            [&] {
              if (member.rank == 0) finish(*transport, transport->send(1, 0, data));
              finish(*transport, transport->receive(1, 0, data));
            },
            &peer);
        EXPECT_EQ(peer, 1);
        EXPECT_THAT(error, HasSubstr(transport->describe(1)));
        transport->abort();
        const Member survivor{
            member.endpoint, {member.addresses[0], member.addresses[2]}, member.rank == 0 ? 0 : 1};
        const auto next = survivor.connect(2);
        meet(*next);
      },
      1);
}

// Where this process listens, on loopback.
std::vector<std::uint16_t> listening_ports() {
  std::set<std::string> own;  // sockets
  for (const auto& each : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code closed;
    own.insert(std::filesystem::read_symlink(each.path(), closed).string());
  }
  std::vector<std::uint16_t> ports;
  std::ifstream table("/proc/self/net/tcp");
  for (std::string line; std::getline(table, line);) {
    std::istringstream words(line);
    std::string number, local, remote, state, skipped, inode;
    words >> number >> local >> remote >> state;
    for (int i = 0; i < 5; ++i) words >> skipped;
    words >> inode;
    if (state == "0A" && own.contains("socket:[" + inode + "]"))
      ports.push_back(static_cast<std::uint16_t>(std::stoi(local.substr(9), nullptr, 16)));
  }
  return ports;
}

// Says something that no engine understands to whoever listens there.
UniqueFd stranger(std::uint16_t port, std::span<const std::byte> says) {
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(port);
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
  ::send(fd.get(), says.data(), says.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  return fd;
}

// Who connects without the greeting is not heard, whatever he says and for however long, also at
// the ports that the engine itself has opened; nor does it matter when he goes.
TEST_P(Processes, StrangersAtTheDoors) {
  run_processes(GetParam(), {.key = "secret"}, 2, [](const Member& member) {
    std::vector<UniqueFd> strangers;
    for (unsigned generation = 1; generation <= 4; ++generation) {
      const auto transport = member.connect(generation);
      const auto come = [&] {
        const std::vector<std::uint16_t> ports = listening_ports();
        EXPECT_EQ(ports.size(), GetParam() == Engine::ucx ? 2u : 1u);
        for (const std::uint16_t port : ports)
          for (const std::size_t length : {0, 1, 8, 60, 100'000})
            strangers.push_back(stranger(port, pattern(length, generation)));
      };
      come();
      meet(*transport);
      const std::vector<std::byte> sent = pattern(kSome, member.rank);
      std::vector<std::byte> received(kSome);
      const auto in = transport->receive(1 - member.rank, 0, received);
      const auto out = transport->send(1 - member.rank, 0, sent);
      come();
      if (generation % 2 == 0) strangers.clear();
      finish(*transport, {in, out});
      EXPECT_TRUE(received == pattern(kSome, 1 - member.rank));
      meet(*transport);
    }
  });
}

// Who knows how UCX's own connections begin gets further, and what UCX (1.13) can't read there ends
// the process (docs/security.md). That is no worse than any death: the peers name it.
TEST(Ucx, AStrangerWhoSpeaksItsLanguage) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE")) GTEST_SKIP() << "not under mpirun";
  if (const std::string why = unavailable(Engine::ucx); !why.empty()) GTEST_SKIP() << why;
  run_processes(
      Engine::ucx, {.key = "secret"}, 2,
      [](const Member& member) {
        const auto transport = member.connect();
        meet(*transport);
        const std::vector<std::byte> sent = pattern(kSome, member.rank);
        std::vector<std::byte> received(kSome);
        const auto in = transport->receive(1 - member.rank, 0, received);
        const auto out = transport->send(1 - member.rank, 0, sent);
        if (member.rank == 1) {
          constexpr std::uint64_t kMagic = 0xcafebabe12345678;
          std::vector<std::byte> says = pattern(100'000, 3);
          std::memcpy(says.data(), &kMagic, sizeof(kMagic));
          std::vector<UniqueFd> strangers;
          for (const std::uint16_t port : listening_ports())
            strangers.push_back(stranger(port, says));
          finish(*transport, {in, out});
          EXPECT_TRUE(received == pattern(kSome, 0));
          ::raise(SIGKILL);  // not before
        }
        int peer = -1;
        const std::string error = error_of(
            [&] {
              finish(*transport, {in, out});
              EXPECT_TRUE(received == pattern(kSome, 1));
              finish(*transport, transport->receive(1, 1, received));
            },
            &peer);
        EXPECT_EQ(peer, 1);
        EXPECT_THAT(error, HasSubstr(transport->describe(1)));
      },
      1);
}

TEST(Zmq, AnotherKeyIsNamed) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE")) GTEST_SKIP() << "not under mpirun";
  const auto one = make_endpoint(Engine::zmq, {.key = "one"});
  const auto other = make_endpoint(Engine::zmq, {.key = "other"});
  const std::vector<std::string> addresses = {one->address(), other->address()};
  std::jthread thread([&] {
    const auto transport = other->connect(addresses, 1, {.generation = 1});
    EXPECT_NE(error_of([&] { finish(*transport, transport->receive(0, 0, {})); }), "");
  });
  const auto transport = one->connect(addresses, 0, {.generation = 1});
  EXPECT_THAT(error_of([&] { finish(*transport, transport->receive(1, 0, {})); }),
              HasSubstr("has another key"));
  thread.join();
}

TEST(Interface, IsNamedWhereThereIsNone) {
  try {
    make_endpoint(Engine::zmq, {.interface = "nothing0"});
    ADD_FAILURE();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("no network interface 'nothing0' that is up; hint: there"));
    EXPECT_THAT(error.what(), HasSubstr("lo"));
  }
}

TEST(Faulty, DelaysDropsTruncatesBreaks) {
  run_loopback(2, [](const Member& member) {
    const int other = 1 - member.rank;
    FaultyTransport faulty(
        member.connect(),
        {.drop_send = 1, .truncate_send = 2, .break_at_send = 4, .delay = [](int, int) {
           return std::chrono::milliseconds(1);
         }});
    int value = 3, theirs = 0;
    const auto out = std::as_bytes(std::span(&value, 1));
    const auto in = std::as_writable_bytes(std::span(&theirs, 1));
    finish(faulty, {faulty.send(other, 0, out), faulty.receive(other, 0, in)});
    EXPECT_EQ(theirs, 3);
    finish(faulty, faulty.send(other, 0, out));  // dropped
    finish(faulty, faulty.send(other, 0, out));  // truncated
    EXPECT_THAT(error_of([&] { finish(faulty, faulty.receive(other, 0, in)); }),
                HasSubstr("sent 3 bytes where 4 were expected"));
    finish(faulty, {faulty.send(other, 1, out), faulty.receive(other, 1, in)});
    error_of([&] { finish(faulty, faulty.send(other, 0, out)); });  // breaks
    error_of([&] { faulty.receive(other, 0, in); });
  });
}

}  // namespace
}  // namespace lockstep
