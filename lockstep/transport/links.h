// One TCP connection between each two ranks of a generation, beside an engine that must be told of
// its peers' addresses and can't be relied on to tell of their end: over it the ranks greet one
// another with a text of the engine's, and its end is the peer's. Whoever dies is known at once;
// who is silent, since the network is cut, in a few seconds (TCP's keepalive).
//
// A greeting proves that who sends it was told this endpoint's address, which has a random part.
// Nothing here is encrypted. One thread for a listener and its Links; these must end before it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/file.h"
#include "lockstep/transport/interface.h"

namespace lockstep {

using LinkToken = std::array<std::byte, 16>;  // random
struct LinkAddress {
  std::string host;
  std::uint16_t port = 0;
  LinkToken token{};

  std::string text(std::string_view engine) const;
  // Untrusted text; throws ConfigError.
  static LinkAddress parse(std::string_view engine, std::string_view text);
};

struct Greeting {
  LinkToken to{}, from{};
  std::uint64_t generation = 0;
  std::uint32_t rank = 0, size = 0;
  std::string text;
};
inline constexpr std::size_t kMostGreetingText = 4 << 10;

// A connection, and what came over it that nobody has taken.
struct Link {
  UniqueFd fd;
  std::vector<std::byte> bytes = {};
  Clock::time_point since = {};
};

// Takes in connections for the process's life, and keeps those of generations to come.
class LinkListener {
 public:
  explicit LinkListener(const Interface& interface);

  const LinkAddress& address() const { return address_; }
  int fd() const { return epoll_.get(); }  // readable: accept() has something to do
  void accept();

  // A generation begins: what older ones, but for those that haven't ended, have sent is dropped.
  void begin(std::uint64_t generation);
  void end(std::uint64_t generation) noexcept;
  struct Arrival {
    Link link;
    Greeting greeting;
  };
  std::vector<Arrival> take(std::uint64_t generation);

 private:
  bool wanted(std::uint64_t generation) const;

  LinkAddress address_;
  UniqueFd listener_, epoll_;
  std::map<int, Link> strangers_;  // by descriptor: have not greeted yet
  std::vector<Arrival> arrivals_;
  std::uint64_t newest_ = 0;
  std::set<std::uint64_t> live_;
};

// Of all ranks' texts; `rank` is the listener's. Throws ConfigError.
std::vector<LinkAddress> link_addresses(std::string_view engine,
                                        const std::vector<std::string>& texts, int rank,
                                        const LinkListener& listener);

class Links {
 public:
  // Begins to reach all ranks; returns at once. `text`: of this rank's greeting.
  Links(LinkListener& listener, std::string_view engine, const std::vector<LinkAddress>& addresses,
        int rank, std::uint64_t generation, std::string text);
  ~Links();
  Links(const Links&) = delete;
  Links& operator=(const Links&) = delete;

  struct Peer {
    std::optional<std::string> text;  // of its greeting
    std::optional<std::uint64_t> farewell;
    std::string lost;  // why the connection has ended, "" while it has not
  };
  const Peer& peer(int rank) const { return states_[rank].peer; }
  bool complete() const { return greeted_ + 1 == static_cast<int>(states_.size()); }
  int fd() const { return epoll_.get(); }  // readable: progress() has something to do
  void progress();
  // Tells the peer that this rank leaves in order, with a number for him; as soon as he is there.
  void say_farewell(int rank, std::uint64_t number);

 private:
  struct State {
    Peer peer;
    Link link;
    bool connecting = false;
    bool greeted = false;  // by us
    std::optional<std::uint64_t> farewell;
  };
  void dial(int rank);
  void read(int rank);
  void parse(int rank);
  void lose(int rank, const std::string& why);
  void greet(int rank);
  void write(int rank, const std::vector<std::byte>& bytes);

  LinkListener& listener_;
  const std::vector<LinkAddress> addresses_;
  const int rank_;
  const Greeting own_;
  UniqueFd epoll_;
  std::vector<State> states_;  // by rank
  int greeted_ = 0;
};

}  // namespace lockstep
