#include "lockstep/transport/links.h"

#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>

#include "lockstep/base/bytes.h"

namespace lockstep {
namespace {

// A greeting: magic, the receiver's and the sender's token, generation, rank, size, the text's
// length, the text; little-endian. After it at most a farewell, a number.
constexpr std::uint64_t kMagic = 0x316b6e696c6b636c;  // "lcklink1"
constexpr std::size_t kTokensAt = 8, kNumbersAt = kTokensAt + 2 * sizeof(LinkToken);
constexpr std::size_t kHeadBytes = kNumbersAt + 20, kFarewellBytes = 8;
constexpr std::size_t kMostStrangers = 256;
constexpr std::size_t kMostArrivals = 4096;
constexpr auto kGreetingTime = std::chrono::seconds(10);

std::vector<std::byte> encode(const Greeting& greeting) {
  std::vector<std::byte> bytes(kHeadBytes + greeting.text.size());
  write_little_endian(kMagic, bytes.data());
  std::ranges::copy(greeting.to, bytes.begin() + kTokensAt);
  std::ranges::copy(greeting.from, bytes.begin() + kTokensAt + sizeof(LinkToken));
  std::byte* numbers = bytes.data() + kNumbersAt;
  write_little_endian(greeting.generation, numbers);
  write_little_endian(greeting.rank, numbers + 8);
  write_little_endian(greeting.size, numbers + 12);
  write_little_endian(static_cast<std::uint32_t>(greeting.text.size()), numbers + 16);
  std::ranges::copy(as_byte_span(greeting.text), bytes.begin() + kHeadBytes);
  return bytes;
}

// Takes a greeting off the bytes; none while it is not whole. Throws Error where it is none, or not
// for `own`.
std::optional<Greeting> take_greeting(std::vector<std::byte>& bytes, const LinkToken& own) {
  if (bytes.size() >= kTokensAt && read_little_endian<std::uint64_t>(bytes, 0) != kMagic)
    throw Error("what came is no greeting");
  if (bytes.size() < kHeadBytes) return std::nullopt;
  Greeting greeting;
  std::copy_n(bytes.begin() + kTokensAt, own.size(), greeting.to.begin());
  std::copy_n(bytes.begin() + kTokensAt + own.size(), own.size(), greeting.from.begin());
  if (CRYPTO_memcmp(greeting.to.data(), own.data(), own.size()) != 0)
    throw Error("the greeting is for another process");
  greeting.generation = *read_little_endian<std::uint64_t>(bytes, kNumbersAt);
  greeting.rank = *read_little_endian<std::uint32_t>(bytes, kNumbersAt + 8);
  greeting.size = *read_little_endian<std::uint32_t>(bytes, kNumbersAt + 12);
  const std::size_t length = *read_little_endian<std::uint32_t>(bytes, kNumbersAt + 16);
  if (length > kMostGreetingText) throw Error("the greeting is too long");
  if (bytes.size() < kHeadBytes + length) return std::nullopt;
  greeting.text.assign(reinterpret_cast<const char*>(bytes.data()) + kHeadBytes, length);
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(kHeadBytes + length));
  return greeting;
}

// Appends what has come, of a greeting and a farewell at most. "" or why there will be no more.
std::string read_some(Link& link) {
  constexpr std::size_t kMost = kHeadBytes + kMostGreetingText + kFarewellBytes;
  std::byte buffer[kMost + 1];
  for (;;) {
    const ssize_t count =
        ::recv(link.fd.get(), buffer, kMost + 1 - std::min(link.bytes.size(), kMost), MSG_DONTWAIT);
    if (count > 0) link.bytes.insert(link.bytes.end(), buffer, buffer + count);
    if (link.bytes.size() > kMost) return "it sent more than a greeting";
    if (count == 0) return "closed the connection";
    if (count < 0 && errno != EINTR) return errno == EAGAIN ? "" : errno_text(errno);
  }
}

struct Resolved {
  sockaddr_storage address{};
  socklen_t length = 0;
};
Resolved resolve(const std::string& host, std::uint16_t port) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0)
    throw ConfigError(fmt::format("'{}' is no address of a network interface", host));
  Resolved resolved;
  resolved.length = found->ai_addrlen;
  std::memcpy(&resolved.address, found->ai_addr, found->ai_addrlen);
  ::freeaddrinfo(found);
  return resolved;
}
UniqueFd bound_socket(const std::string& host) {
  const Resolved own = resolve(host, 0);
  UniqueFd fd(::socket(own.address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd || ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&own.address), own.length) != 0)
    throw Error(fmt::format("cannot bind a socket to {}: {}", host, errno_text(errno)));
  return fd;
}

// A peer that the network has cut off is lost after 1 + 3 seconds.
void set_up(int fd) {
  const auto set = [fd](int level, int option, int value) {
    ::setsockopt(fd, level, option, &value, sizeof value);
  };
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 1);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 1);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, 4000);
  set(IPPROTO_TCP, TCP_NODELAY, 1);
}

void control(int epoll, int operation, int fd, std::uint32_t events, int data) {
  epoll_event event{};
  event.events = events;
  event.data.fd = data;
  if (::epoll_ctl(epoll, operation, fd, &event) != 0)
    throw Error("cannot watch a connection: " + errno_text(errno));
}

}  // namespace

std::string LinkAddress::text(std::string_view engine) const {
  std::string text = fmt::format("{}:{}:", engine, host_and_port(host, port));
  for (const std::byte byte : token) text += fmt::format("{:02x}", std::to_integer<int>(byte));
  return text;
}

LinkAddress LinkAddress::parse(std::string_view engine, std::string_view text) {
  LinkAddress address;
  const auto number = [](std::string_view digits, auto& value, int base) {
    const auto end = digits.data() + digits.size();
    return std::from_chars(digits.data(), end, value, base).ptr == end && !digits.empty();
  };
  const auto parts = [&] {
    const std::size_t hex = text.rfind(':');
    if (text.size() > kMostAddressBytes || !text.starts_with(fmt::format("{}:", engine)) ||
        hex == std::string_view::npos || text.size() - hex - 1 != 2 * address.token.size())
      return false;
    for (std::size_t i = 0; i < address.token.size(); ++i) {
      std::uint8_t byte = 0;
      if (!number(text.substr(hex + 1 + 2 * i, 2), byte, 16)) return false;
      address.token[i] = std::byte{byte};
    }
    std::string_view place = text.substr(0, hex).substr(engine.size() + 1);
    const std::size_t colon = place.rfind(':');
    if (colon == std::string_view::npos || !number(place.substr(colon + 1), address.port, 10))
      return false;
    place = place.substr(0, colon);
    if (place.starts_with('[') && place.ends_with(']')) place = place.substr(1, place.size() - 2);
    address.host = place;
    return address.port != 0;
  };
  if (!parts())
    throw ConfigError(fmt::format("'{}' is no address of a process (engine {})",
                                  text.substr(0, kMostAddressBytes), engine));
  resolve(address.host, address.port);
  return address;
}

LinkListener::LinkListener(const Interface& interface)
    : listener_(bound_socket(interface.address)), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  sockaddr_storage own{};
  socklen_t length = sizeof own;
  if (::listen(listener_.get(), SOMAXCONN) != 0 ||
      ::getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&own), &length) != 0)
    throw Error(fmt::format("cannot listen on {}: {}", interface.address, errno_text(errno)));
  address_.host = interface.address;
  address_.port =
      ntohs(own.ss_family == AF_INET ? reinterpret_cast<const sockaddr_in*>(&own)->sin_port
                                     : reinterpret_cast<const sockaddr_in6*>(&own)->sin6_port);
  if (::RAND_bytes(reinterpret_cast<unsigned char*>(address_.token.data()),
                   static_cast<int>(address_.token.size())) != 1)
    throw Error("no random bytes (OpenSSL)");
  control(epoll_.get(), EPOLL_CTL_ADD, listener_.get(), EPOLLIN, listener_.get());
}

bool LinkListener::wanted(std::uint64_t generation) const {
  return generation >= newest_ || live_.contains(generation);
}

void LinkListener::begin(std::uint64_t generation) {
  live_.insert(generation);
  newest_ = std::max(newest_, generation);
  std::erase_if(arrivals_, [&](const auto& each) { return !wanted(each.greeting.generation); });
}
void LinkListener::end(std::uint64_t generation) noexcept {
  live_.erase(generation);
  if (generation == newest_) ++newest_;
  std::erase_if(arrivals_, [&](const auto& each) { return !wanted(each.greeting.generation); });
}

void LinkListener::accept() {
  const Clock::time_point now = Clock::now();
  for (;;) {
    UniqueFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (!fd) break;  // none, or no descriptor is free, which may change
    set_up(fd.get());
    const int number = fd.get();
    control(epoll_.get(), EPOLL_CTL_ADD, number, EPOLLIN, number);
    strangers_.insert_or_assign(number, Link{.fd = std::move(fd), .since = now});
    if (strangers_.size() > kMostStrangers)
      strangers_.erase(std::ranges::min_element(
          strangers_, {}, [](const auto& entry) { return entry.second.since; }));
  }
  for (auto entry = strangers_.begin(); entry != strangers_.end();) {
    Link& link = entry->second;
    bool keep = now - link.since < kGreetingTime;
    try {
      keep = read_some(link).empty() && keep;
      if (auto greeting = take_greeting(link.bytes, address_.token)) {
        if (wanted(greeting->generation) && arrivals_.size() < kMostArrivals) {
          ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, link.fd.get(), nullptr);
          arrivals_.push_back({std::move(link), std::move(*greeting)});
        }
        keep = false;
      }
    } catch (const Error&) {
      keep = false;  // who it was is not worth a word: anybody may knock
    }
    entry = keep ? std::next(entry) : strangers_.erase(entry);
  }
}

std::vector<LinkListener::Arrival> LinkListener::take(std::uint64_t generation) {
  std::vector<Arrival> taken;
  for (Arrival& each : arrivals_)
    if (each.greeting.generation == generation) taken.push_back(std::move(each));
  std::erase_if(arrivals_, [](const Arrival& each) { return !each.link.fd; });
  return taken;
}

std::vector<LinkAddress> link_addresses(std::string_view engine,
                                        const std::vector<std::string>& texts, int rank,
                                        const LinkListener& listener) {
  std::vector<LinkAddress> addresses;
  for (const std::string& text : texts) addresses.push_back(LinkAddress::parse(engine, text));
  LOCKSTEP_CHECK(rank >= 0 && rank < static_cast<int>(addresses.size()) &&
                 addresses[rank].token == listener.address().token);
  return addresses;
}

// Of two ranks the higher one calls.
Links::Links(LinkListener& listener, std::string_view engine,
             const std::vector<LinkAddress>& addresses, int rank, std::uint64_t generation,
             std::string text)
    : listener_(listener),
      addresses_(addresses),
      rank_(rank),
      own_{.from = listener.address().token,
           .generation = generation,
           .rank = static_cast<std::uint32_t>(rank),
           .size = static_cast<std::uint32_t>(addresses.size()),
           .text = std::move(text)},
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      states_(addresses.size()) {
  if (own_.text.size() > kMostGreetingText)
    throw Error(fmt::format("{}: an address of {} bytes is too long", engine, own_.text.size()));
  listener_.begin(generation);
  control(epoll_.get(), EPOLL_CTL_ADD, listener_.fd(), EPOLLIN, -1);
  for (int peer = 0; peer < rank_; ++peer) dial(peer);
  progress();
}
Links::~Links() { listener_.end(own_.generation); }

void Links::dial(int rank) {
  State& state = states_[rank];
  const Resolved theirs = resolve(addresses_[rank].host, addresses_[rank].port);
  state.link.fd = bound_socket(listener_.address().host);
  set_up(state.link.fd.get());
  state.connecting = true;
  if (::connect(state.link.fd.get(), reinterpret_cast<const sockaddr*>(&theirs.address),
                theirs.length) != 0 &&
      errno != EINPROGRESS)
    return lose(rank, errno_text(errno));
  control(epoll_.get(), EPOLL_CTL_ADD, state.link.fd.get(), EPOLLOUT, rank);
}

void Links::greet(int rank) {
  Greeting greeting = own_;
  greeting.to = addresses_[rank].token;
  write(rank, encode(greeting));
  states_[rank].greeted = true;
  if (states_[rank].farewell) say_farewell(rank, *states_[rank].farewell);
}

// Few bytes in an empty connection: they fit.
void Links::write(int rank, const std::vector<std::byte>& bytes) {
  const State& state = states_[rank];
  if (!state.link.fd) return;
  const ssize_t count =
      ::send(state.link.fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (count != static_cast<ssize_t>(bytes.size()))
    lose(rank, count < 0 ? errno_text(errno) : "takes no greeting");
}

void Links::say_farewell(int rank, std::uint64_t number) {
  states_[rank].farewell = number;
  if (!states_[rank].greeted) return;
  std::vector<std::byte> bytes(kFarewellBytes);
  write_little_endian(number, bytes.data());
  write(rank, bytes);
}

void Links::lose(int rank, const std::string& why) {
  State& state = states_[rank];
  if (state.peer.lost.empty()) state.peer.lost = why;
  state.link.fd = UniqueFd();
}

void Links::parse(int rank) {
  State& state = states_[rank];
  std::vector<std::byte>& bytes = state.link.bytes;
  if (!state.peer.text) {
    const auto greeting = take_greeting(bytes, own_.from);
    if (!greeting) return;
    if (greeting->from != addresses_[rank].token ||
        greeting->rank != static_cast<std::uint32_t>(rank) || greeting->size != own_.size ||
        greeting->generation != own_.generation)
      throw Error("greets as somebody else");
    state.peer.text = greeting->text;
    ++greeted_;
  }
  if (bytes.size() == kFarewellBytes)
    state.peer.farewell = read_little_endian<std::uint64_t>(bytes, 0);
  else if (bytes.size() > kFarewellBytes)
    throw Error("says more than a farewell");
}

void Links::read(int rank) {
  State& state = states_[rank];
  if (!state.link.fd) return;
  if (state.connecting) {
    int error = 0;
    socklen_t length = sizeof error;
    ::getsockopt(state.link.fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) return lose(rank, errno_text(error));
    sockaddr_storage theirs{};
    length = sizeof theirs;
    if (::getpeername(state.link.fd.get(), reinterpret_cast<sockaddr*>(&theirs), &length) != 0)
      return;  // not yet
    state.connecting = false;
    control(epoll_.get(), EPOLL_CTL_MOD, state.link.fd.get(), EPOLLIN, rank);
    greet(rank);
    return;
  }
  std::string why = read_some(state.link);
  try {
    parse(rank);
  } catch (const Error& error) {
    why = error.what();
  }
  if (!why.empty()) lose(rank, why);
}

void Links::progress() {
  std::array<epoll_event, 16> events;
  for (;;) {
    const int count = ::epoll_wait(epoll_.get(), events.data(), events.size(), 0);
    bool called = false;
    for (int i = 0; i < count; ++i) {
      if (events[i].data.fd < 0)
        called = true;
      else
        read(events[i].data.fd);
    }
    if (called) listener_.accept();
    // Also what another generation's progress() has taken in.
    for (auto& [link, greeting] : listener_.take(own_.generation)) {
      const std::uint32_t rank = greeting.rank;
      if (rank <= static_cast<std::uint32_t>(rank_) || rank >= own_.size ||
          greeting.from != addresses_[rank].token || greeting.size != own_.size ||
          states_[rank].peer.text || !states_[rank].peer.lost.empty())
        continue;
      State& state = states_[rank];
      state.link = std::move(link);
      state.peer.text = std::move(greeting.text);
      ++greeted_;
      control(epoll_.get(), EPOLL_CTL_ADD, state.link.fd.get(), EPOLLIN, static_cast<int>(rank));
      greet(static_cast<int>(rank));
      if (state.link.fd) read(static_cast<int>(rank));
    }
    if (count < static_cast<int>(events.size())) return;
  }
}

}  // namespace lockstep
