// What every engine must do.
#include <gmock/gmock.h>

#include <algorithm>

#include "lockstep/transport/backends_test.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using Tickets = std::vector<Transport::Ticket>;
constexpr std::size_t kLarge = (9 << 20) + 5;

class Conformance : public ::testing::TestWithParam<Backend> {
 protected:
  void run(int size, const Body& body) const { GetParam().run(size, body); }
};
INSTANTIATE_TEST_SUITE_P(Engines, Conformance, ::testing::ValuesIn(backends()),
                         [](const auto& info) { return info.param.name; });

TEST_P(Conformance, SaysWhoIsWho) {
  run(2, [](const Member& member) {
    const auto transport = member.connect();
    EXPECT_EQ(transport->rank(), member.rank);
    EXPECT_EQ(transport->size(), 2);
    EXPECT_EQ(transport->name(), member.endpoint.name());
    EXPECT_LE(member.addresses[member.rank].size(), kMostAddressBytes);
    EXPECT_EQ(member.addresses[member.rank], member.endpoint.address());
    EXPECT_THAT(transport->describe(1 - member.rank),
                HasSubstr(std::string("rank ") + (member.rank ? "0 (" : "1 (")));
    meet(*transport);
  });
}

TEST_P(Conformance, EveryLengthArrives) {
  const std::vector<std::size_t> lengths = {0, 1, 7, 64, 1024, 1025, 65536, 300001, kLarge, 3};
  run(2, [&](const Member& member) {
    const auto transport = member.connect();
    for (unsigned turn = 0; turn < 2 * lengths.size(); ++turn) {
      const std::size_t length = lengths[turn / 2];
      const std::vector<std::byte> sent = pattern(length, turn);
      std::vector<std::byte> received(length);
      if (static_cast<int>(turn % 2) == member.rank) {
        finish(*transport, transport->send(1 - member.rank, 0, sent));
      } else {
        finish(*transport, transport->receive(1 - member.rank, 0, received));
        EXPECT_TRUE(received == sent) << "length " << length;
      }
    }
    meet(*transport);
  });
}

TEST_P(Conformance, BothDirectionsAtOnce) {
  run(2, [](const Member& member) {
    const auto transport = member.connect();
    const std::vector<std::byte> sent = pattern(kLarge, member.rank);
    std::vector<std::byte> received(kLarge);
    for (int turn = 0; turn < 3; ++turn) {
      std::ranges::fill(received, std::byte{});
      const auto send = transport->send(1 - member.rank, 5, sent);
      finish(*transport, {transport->receive(1 - member.rank, 5, received), send});
      EXPECT_TRUE(received == pattern(kLarge, 1 - member.rank));
    }
  });
}

// In order on a channel, whatever the lengths; channels don't wait for each other.
TEST_P(Conformance, ChannelsKeepTheirOrder) {
  constexpr int kMessages = 60;
  const auto length = [](int i) -> std::size_t { return i % 7 == 3 ? 200000 + i : i; };
  run(2, [&](const Member& member) {
    const auto transport = member.connect();
    std::vector<std::vector<std::byte>> data;
    Tickets tickets;
    if (member.rank == 0) {
      for (int i = 0; i < kMessages; ++i)
        for (const std::uint16_t channel : {0, 1, 65000}) {
          data.push_back(pattern(length(i), i + channel));
          tickets.push_back(transport->send(1, channel, data.back()));
        }
    } else {
      for (const std::uint16_t channel : {65000, 1, 0})
        for (int i = 0; i < kMessages; ++i) {
          data.emplace_back(length(i));
          tickets.push_back(transport->receive(0, channel, data.back()));
        }
      std::ranges::reverse(tickets);
    }
    finish(*transport, tickets);
    if (member.rank == 1)
      for (std::size_t n = 0; n < data.size(); ++n) {
        const int i = static_cast<int>(n % kMessages);
        const int channel = n < kMessages ? 65000 : n < 2 * kMessages ? 1 : 0;
        EXPECT_TRUE(data[n] == pattern(length(i), i + channel)) << channel << ", " << i;
      }
    meet(*transport);
  });
}

TEST_P(Conformance, ManySmallMessagesBeforeAnyReceive) {
  constexpr int kMessages = 3000;
  run(2, [](const Member& member) {
    const auto transport = member.connect();
    std::vector<int> values(kMessages);
    Tickets tickets;
    if (member.rank == 0) {
      for (int i = 0; i < kMessages; ++i) {
        values[i] = i;
        tickets.push_back(transport->send(1, 0, std::as_bytes(std::span(&values[i], 1))));
      }
      tickets.push_back(transport->send(1, 1, {}));
      finish(*transport, tickets);
    } else {
      finish(*transport, transport->receive(0, 1, {}));
      for (int i = 0; i < kMessages; ++i) {
        finish(*transport,
               transport->receive(0, 0, std::as_writable_bytes(std::span(&values[i], 1))));
        EXPECT_EQ(values[i], i);
      }
    }
    meet(*transport);
  });
}

TEST_P(Conformance, EverybodyWithEverybody) {
  run(5, [](const Member& member) {
    const auto transport = member.connect();
    for (const std::size_t bytes : {std::size_t{40}, std::size_t{500003}}) {
      std::vector<std::vector<std::byte>> sent(5), received(5);
      Tickets tickets;
      for (int peer = 0; peer < 5; ++peer) {
        if (peer == member.rank) continue;
        sent[peer] = pattern(bytes, 5 * member.rank + peer);
        received[peer].resize(bytes);
        tickets.push_back(transport->send(peer, 2, sent[peer]));
        tickets.push_back(transport->receive(peer, 2, received[peer]));
      }
      finish(*transport, tickets);
      for (int peer = 0; peer < 5; ++peer)
        EXPECT_TRUE(peer == member.rank ||
                    received[peer] == pattern(bytes, 5 * peer + member.rank));
    }
    meet(*transport);
  });
}

TEST_P(Conformance, LengthsThatDiffer) {
  for (const auto& [sent, expected] : {std::pair<std::size_t, std::size_t>{12, 8},
                                       {8, 12},
                                       {0, 4},
                                       {kLarge, 1024},
                                       {5, kLarge},
                                       {kLarge, kLarge - 1}}) {
    run(2, [&](const Member& member) {
      const auto transport = member.connect();
      std::vector<std::byte> data(member.rank == 0 ? sent : expected);
      std::string error;
      try {
        if (member.rank == 0)
          finish(*transport, transport->send(1, 0, data));
        else
          finish(*transport, transport->receive(0, 0, data));
      } catch (const TransportError& thrown) {
        error = thrown.what();
        EXPECT_EQ(thrown.peer(), 1 - member.rank);
      }
      if (member.rank == 1) {
        EXPECT_THAT(error, HasSubstr(transport->describe(0)));
        EXPECT_THAT(error, HasSubstr(std::to_string(expected)));
      }
    });
  }
}

// What was sent arrives though the sender has gone; then he is named.
TEST_P(Conformance, WhoHasLeft) {
  if (!GetParam().tells_of_an_end) GTEST_SKIP() << "mpirun ends all when one ends";
  run(3, [](const Member& member) {
    auto transport = member.connect();
    meet(*transport);
    int value = 17;
    const auto bytes = std::as_writable_bytes(std::span(&value, 1));
    if (member.rank == 1) {
      finish(*transport, transport->send(0, 0, bytes));
      transport.reset();
    } else if (member.rank == 0) {
      value = 0;
      const auto first = transport->receive(1, 0, bytes);
      finish(*transport, first);
      EXPECT_EQ(value, 17);
      int peer = -1;
      const std::string error =
          error_of([&] { finish(*transport, transport->receive(1, 0, bytes)); }, &peer);
      EXPECT_EQ(peer, 1);
      EXPECT_THAT(error, HasSubstr(transport->describe(1)));
      EXPECT_THAT(error, HasSubstr(std::string(transport->name()) + ": "));
      std::vector<std::byte> large(kLarge);  // nor can anything be sent to him
      error_of([&] { finish(*transport, transport->send(1, 0, large)); });
      // The others are still there.
      value = 5;
      finish(*transport, transport->send(2, 0, bytes));
    } else {
      finish(*transport, transport->receive(0, 0, bytes));
      EXPECT_EQ(value, 5);
    }
  });
}

// A transfer ends in the middle; its bytes are the caller's again; the next generation is whole.
TEST_P(Conformance, AbortAndTheNextGeneration) {
  if (!GetParam().tells_of_an_end) GTEST_SKIP() << "mpirun ends all when one ends";
  run(3, [](const Member& member) {
    std::vector<std::byte> sent = pattern(kLarge, 3), received(kLarge);
    for (std::uint64_t generation = 1; generation <= 4; ++generation) {
      const auto transport = member.connect(generation);
      const int next = (member.rank + 1) % 3, previous = (member.rank + 2) % 3;
      int stale = 1000;
      const auto bytes = std::as_writable_bytes(std::span(&stale, 1));
      transport->send(next, 9, bytes);
      transport->send(next, 1, sent);
      const auto ticket = transport->receive(previous, 1, received);
      try {
        if (generation != 4) meet(*transport);
        const bool over = transport->done(ticket);
        // In odd generations those whose peer does nothing wait for him until he has left.
        if (generation % 2 == 1 && member.rank != 1) {
          if (!over) finish(*transport, ticket);
          finish(*transport, transport->receive(previous, 2, bytes));
        }
      } catch (const TransportError& error) {
        EXPECT_GE(error.peer(), 0) << error.what();
      }
      transport->abort();
      transport->abort();
      std::ranges::fill(received, std::byte{1});
      std::ranges::fill(sent, std::byte{2});
      EXPECT_NE(error_of([&] { transport->done(ticket); }), "");
      EXPECT_NE(error_of([&] { transport->send(next, 0, {}); }), "");
      EXPECT_NE(error_of([&] { transport->receive(next, 0, {}); }), "");
      EXPECT_NE(error_of([&] { transport->wait(std::chrono::seconds(1)); }), "");
      EXPECT_TRUE(std::ranges::all_of(received, [](std::byte b) { return b == std::byte{1}; }));
      sent = pattern(kLarge, 3);
    }
    const auto transport = member.connect(5);
    int value = member.rank, theirs = -1;
    const auto ticket =
        transport->receive((member.rank + 2) % 3, 9, std::as_writable_bytes(std::span(&theirs, 1)));
    finish(*transport,
           transport->send((member.rank + 1) % 3, 9, std::as_bytes(std::span(&value, 1))));
    finish(*transport, ticket);
    EXPECT_EQ(theirs, (member.rank + 2) % 3);
    meet(*transport);
  });
}

// Ranks enter a generation one after the other; who is early may send at once.
TEST_P(Conformance, LateComers) {
  run(3, [](const Member& member) {
    const auto before = member.connect(1);
    if (member.rank == 2) finish(*before, before->receive(0, 0, {}));
    const auto transport = member.connect(2);
    const std::vector<std::byte> sent = pattern(kLarge, member.rank);
    std::vector<std::vector<std::byte>> received(3, std::vector<std::byte>(kLarge));
    Tickets tickets;
    for (int peer = 0; peer < 3; ++peer)
      if (peer != member.rank) tickets.push_back(transport->send(peer, 0, sent));
    if (member.rank == 0) finish(*before, before->send(2, 0, {}));
    for (int peer = 0; peer < 3; ++peer)
      if (peer != member.rank) tickets.push_back(transport->receive(peer, 0, received[peer]));
    finish(*transport, tickets);
    for (int peer = 0; peer < 3; ++peer)
      EXPECT_TRUE(peer == member.rank || received[peer] == pattern(kLarge, peer));
    meet(*transport);
  });
}

TEST_P(Conformance, OddAddresses) {
  run(1, [](const Member& member) {
    for (const std::string& odd : {std::string(), std::string("nonsense"), std::string(3000, 'x'),
                                   std::string(member.endpoint.name()) + ":",
                                   std::string(member.endpoint.name()) + ":\n99:1"})
      EXPECT_THROW(member.endpoint.connect({member.addresses[0], odd}, 0, {}), ConfigError) << odd;
  });
}

TEST_P(Conformance, WaitsNoLongerThanAsked) {
  run(2, [](const Member& member) {
    const auto transport = member.connect();
    meet(*transport);
    if (member.rank == 0) {
      int value = 0;
      const auto ticket = transport->receive(1, 0, std::as_writable_bytes(std::span(&value, 1)));
      for (int i = 0; i < 5; ++i) {
        EXPECT_FALSE(transport->done(ticket));
        transport->wait(std::chrono::milliseconds(2));
      }
    }
    meet(*transport);
  });
}

TEST(Engines, HaveNames) {
  for (const Engine engine : {Engine::ucx, Engine::mpi, Engine::zmq})
    EXPECT_EQ(engine_from(name_of(engine)), engine);
  try {
    engine_from("ucz");
    ADD_FAILURE();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("no engine 'ucz'; hint: did you mean 'ucx'?"));
  }
}

}  // namespace
}  // namespace lockstep
