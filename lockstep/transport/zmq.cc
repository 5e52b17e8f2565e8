// ZeroMQ over TCP, encrypted with CURVE where there is a key: for networks that are not trusted. A
// generation has a ZeroMQ context of its own; Links carry its port and tell of a peer's end, but
// nothing that must be kept secret: the server's public key follows from the job's key, as its
// secret one does, so that only who has the job's key can speak to it or answer for it.
//
// Bytes are copied when they are sent and when they arrive.
#include <zmq.h>

#include <fmt/format.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <utility>
#include <zmq.hpp>

#include "lockstep/base/bytes.h"
#include "lockstep/transport/engines.h"
#include "lockstep/transport/interface.h"
#include "lockstep/transport/linked_transport.h"
#include "lockstep/transport/tickets.h"

namespace lockstep {
namespace {

constexpr std::int64_t kMostMessageBytes = std::int64_t{1} << 36;
// Of a message: the sender's rank, the channel, how many messages he sent before.
constexpr std::size_t kHeadBytes = 4 + 2 + 8;

struct Curve {
  std::string public_key = {}, secret_key = {};  // Z85; "" where nothing is encrypted
  std::string proof;                             // that two have the same, in the clear
};

Curve curve_from(const std::string& key) {
  if (key.empty()) return {};
  const auto derive = [&](std::string_view what) {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    ::HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()),
           reinterpret_cast<const unsigned char*>(what.data()), what.size(), digest.data(),
           nullptr);
    std::array<char, 41> text{};
    ::zmq_z85_encode(text.data(), digest.data(), 32);
    return std::string(text.data());
  };
  Curve curve{.secret_key = derive("lockstep transport: secret key"),
              .proof = derive("lockstep transport: proof")};
  std::array<char, 41> text{};
  if (::zmq_curve_public(text.data(), curve.secret_key.c_str()) != 0)
    throw ConfigError("zmq: this libzmq has no CURVE", "one that was built with libsodium");
  curve.public_key = text.data();
  return curve;
}

struct Operation {
  int peer = 0;
  std::span<std::byte> bytes = {};  // of a receive
  bool over = false;
  std::string error = {};
};

class ZmqTransport final : public LinkedTransport {
 public:
  ZmqTransport(const Curve& curve, LinkListener& listener,
               const std::vector<LinkAddress>& addresses, int rank, std::uint64_t generation)
      : LinkedTransport(addresses, rank), curve_(curve), peers_(addresses.size()) {
    context_.emplace(1);
    mailbox_ = socket(zmq::socket_type::pull);
    if (!curve_.secret_key.empty()) {
      mailbox_.set(zmq::sockopt::curve_server, 1);
      mailbox_.set(zmq::sockopt::curve_secretkey, curve_.secret_key);
    }
    const std::string& host = listener.address().host;
    mailbox_.bind("tcp://" + host_and_port(host, 0));
    const std::string bound = mailbox_.get(zmq::sockopt::last_endpoint);
    links_.emplace(listener, "zmq", addresses, rank, generation,
                   curve_.proof + bound.substr(bound.rfind(':')));
  }
  ~ZmqTransport() override {
    if (!aborted_) leave();
    abort();
  }

  std::string_view name() const override { return "zmq"; }
  Ticket send(int to, std::uint16_t channel, std::span<const std::byte> bytes) override;
  Ticket receive(int from, std::uint16_t channel, std::span<std::byte> bytes) override;
  bool done(Ticket ticket) override;
  void wait(Clock::duration at_most) override;
  void abort() noexcept override;

 private:
  struct Peer {
    zmq::socket_t socket;                 // to him, once he has greeted
    std::deque<zmq::message_t> deferred;  // until then
  };
  struct Pipe {  // what comes from a rank on a channel
    std::deque<zmq::message_t> messages;
    std::deque<Ticket> receives;
  };

  zmq::socket_t socket(zmq::socket_type type) {
    zmq::socket_t made(*context_, type);
    made.set(zmq::sockopt::linger, 0);
    made.set(zmq::sockopt::sndhwm, 0);
    made.set(zmq::sockopt::rcvhwm, 0);
    made.set(zmq::sockopt::ipv6, 1);
    made.set(zmq::sockopt::maxmsgsize, kMostMessageBytes);
    made.set(zmq::sockopt::reconnect_ivl, -1);  // who has gone has gone
    return made;
  }
  void greeted(int peer, const std::string& text) override;
  void progress() override;
  bool owes(int peer) override { return !peers_[peer].deferred.empty(); }
  void take(zmq::message_t message);
  void deliver(const zmq::message_t& message, Operation& receive) const;

  const Curve curve_;
  std::optional<zmq::context_t> context_;
  zmq::socket_t mailbox_;
  std::vector<Peer> peers_;
  std::map<std::pair<int, std::uint16_t>, Pipe> pipes_;
  Tickets<Operation> tickets_;
};

Transport::Ticket ZmqTransport::send(int to, std::uint16_t channel,
                                     std::span<const std::byte> bytes) {
  check_open(to);
  Peer& peer = peers_[to];
  zmq::message_t message(kHeadBytes + bytes.size());
  auto* const data = message.data<std::byte>();
  write_little_endian(static_cast<std::uint32_t>(rank()), data);
  write_little_endian(channel, data + 4);
  write_little_endian(partners_[to].sent++, data + 6);
  if (!bytes.empty()) std::memcpy(data + kHeadBytes, bytes.data(), bytes.size());
  if (peer.socket)
    peer.socket.send(message, zmq::send_flags::dontwait);
  else
    peer.deferred.push_back(std::move(message));
  return tickets_.add({.peer = to, .over = alive(to)});
}

Transport::Ticket ZmqTransport::receive(int from, std::uint16_t channel,
                                        std::span<std::byte> bytes) {
  check_open(from);
  const Ticket ticket = tickets_.add({.peer = from, .bytes = bytes});
  Pipe& pipe = pipes_[{from, channel}];
  if (pipe.messages.empty()) {
    pipe.receives.push_back(ticket);
  } else {
    deliver(pipe.messages.front(), tickets_.at(ticket));
    pipe.messages.pop_front();
  }
  return ticket;
}

void ZmqTransport::deliver(const zmq::message_t& message, Operation& receive) const {
  const std::size_t length = message.size() - kHeadBytes;
  if (length != receive.bytes.size())
    receive.error =
        fmt::format("sent {} bytes where {} were expected", length, receive.bytes.size());
  else if (length > 0)
    std::memcpy(receive.bytes.data(), message.data<std::byte>() + kHeadBytes, length);
  receive.over = true;
}

void ZmqTransport::take(zmq::message_t message) {
  const std::span<const std::byte> bytes(message.data<std::byte>(), message.size());
  const auto number = read_little_endian<std::uint64_t>(bytes, 6);
  if (!number) return;  // none of ours
  const auto rank = static_cast<int>(*read_little_endian<std::uint32_t>(bytes, 0));
  if (rank < 0 || rank >= size() || !alive(rank)) return;
  Partner& partner = partners_[rank];
  if (*number != partner.received++) {
    partner.error = "messages are missing";
    return;
  }
  Pipe& pipe = pipes_[{rank, *read_little_endian<std::uint16_t>(bytes, 4)}];
  if (pipe.receives.empty()) {
    pipe.messages.push_back(std::move(message));
  } else {
    deliver(message, tickets_.at(pipe.receives.front()));
    pipe.receives.pop_front();
  }
}

bool ZmqTransport::done(Ticket ticket) {
  check_open();
  progress();
  const Operation& operation = tickets_.at(ticket);
  if (!operation.error.empty()) fail(operation.peer, operation.error);
  if (operation.over) {
    tickets_.remove(ticket);
    return true;
  }
  if (!alive(operation.peer)) fail(operation.peer, partners_[operation.peer].error);
  return false;
}

void ZmqTransport::progress() {
  zmq::message_t message;
  while (mailbox_.recv(message, zmq::recv_flags::dontwait)) take(std::move(message));
  look_now_and_then();
}

void ZmqTransport::greeted(int rank, const std::string& text) {
  Peer& peer = peers_[rank];
  const std::size_t colon = text.rfind(':');
  std::uint16_t port = 0;
  if (colon != std::string::npos)
    std::from_chars(text.data() + colon + 1, text.data() + text.size(), port);
  if (port == 0 || text.substr(0, colon) != curve_.proof) {
    partners_[rank].error = "has another key";
    return;
  }
  zmq::socket_t made = socket(zmq::socket_type::push);
  if (!curve_.secret_key.empty()) {
    made.set(zmq::sockopt::curve_serverkey, curve_.public_key);
    made.set(zmq::sockopt::curve_publickey, curve_.public_key);
    made.set(zmq::sockopt::curve_secretkey, curve_.secret_key);
  }
  made.connect("tcp://" + host_and_port(host_of(rank), port));
  for (zmq::message_t& message : std::exchange(peer.deferred, {}))
    made.send(message, zmq::send_flags::dontwait);
  peer.socket = std::move(made);
}

void ZmqTransport::wait(Clock::duration at_most) {
  check_open();
  // Its descriptor tells of news since somebody last looked.
  if (mailbox_.get(zmq::sockopt::events) & ZMQ_POLLIN) return;
  sleep(mailbox_.get(zmq::sockopt::fd), at_most);
}

void ZmqTransport::abort() noexcept {
  if (std::exchange(aborted_, true)) return;
  for (Peer& peer : peers_) peer.socket.close();
  mailbox_.close();
  context_.reset();
  links_.reset();
}

class ZmqEndpoint final : public Endpoint {
 public:
  explicit ZmqEndpoint(const EndpointOptions& options)
      : curve_(curve_from(options.key)), listener_(find_interface(options)) {}

  std::string_view name() const override { return "zmq"; }
  std::string address() const override { return listener_.address().text("zmq"); }
  std::unique_ptr<Transport> connect(const std::vector<std::string>& addresses, int rank,
                                     const ConnectOptions& options) override {
    return std::make_unique<ZmqTransport>(curve_, listener_,
                                          link_addresses("zmq", addresses, rank, listener_), rank,
                                          options.generation);
  }

 private:
  Curve curve_;
  LinkListener listener_;
};

}  // namespace

std::unique_ptr<Endpoint> make_zmq_endpoint(const EndpointOptions& options) {
  return std::make_unique<ZmqEndpoint>(options);
}

}  // namespace lockstep
