#include <fmt/format.h>

#include <charconv>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "lockstep/transport/tickets.h"
#include "lockstep/transport/transport.h"

namespace lockstep {
namespace {

// Larger ones are over when they are received, as with other engines.
constexpr std::size_t kMostCopied = 1024;
constexpr std::string_view kPrefix = "loopback:";

struct Operation {
  int peer = 0;
  std::span<const std::byte> from;  // of a send
  std::span<std::byte> to;          // of a receive
  std::vector<std::byte> copy;
  bool matched = false;
  std::string error;
};
using OperationPointer = std::shared_ptr<Operation>;

// What one endpoint sends another one on a channel: either nobody has asked for it yet, or nobody
// has sent it.
struct Pipe {
  std::deque<OperationPointer> sends, receives;
};
struct PipeKey {
  std::uint64_t generation = 0;
  int from = 0, to = 0;  // endpoints
  std::uint16_t channel = 0;
  auto operator<=>(const PipeKey&) const = default;
};
using Member = std::pair<std::uint64_t, int>;  // generation, endpoint

}  // namespace

// All state of all endpoints.
class LoopbackHub {
 public:
  std::mutex mutex;
  std::condition_variable moved;
  std::uint64_t moves = 0;
  int endpoints = 0;
  std::set<Member> joined, left;
  std::map<PipeKey, Pipe> pipes;
};

namespace {

class LoopbackTransport final : public Transport {
 public:
  LoopbackTransport(std::shared_ptr<LoopbackHub> hub, std::vector<int> endpoints, int rank,
                    std::uint64_t generation)
      : hub_(std::move(hub)),
        endpoints_(std::move(endpoints)),
        rank_(rank),
        generation_(generation) {
    const std::lock_guard lock(hub_->mutex);
    if (!hub_->joined.emplace(generation, endpoints_[rank]).second)
      throw TransportError(rank, fmt::format("loopback: {} is in generation {} already",
                                             describe(rank), generation));
  }
  ~LoopbackTransport() override { abort(); }

  std::string_view name() const override { return "loopback"; }
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(endpoints_.size()); }
  std::string describe(int peer) const override {
    return fmt::format("rank {} ({}{})", peer, kPrefix, endpoints_.at(peer));
  }

  Ticket send(int to, std::uint16_t channel, std::span<const std::byte> bytes) override {
    auto send = begin(to);
    send->from = bytes;
    const std::lock_guard lock(hub_->mutex);
    Pipe& pipe = pipe_to(to, channel);
    if (!pipe.receives.empty()) {
      match(*send, *pipe.receives.front(), rank_);
      pipe.receives.pop_front();
    } else if (!has_left(to)) {
      if (bytes.size() <= kMostCopied) {
        send->copy.assign(bytes.begin(), bytes.end());
        send->from = send->copy;
        send->matched = true;
      }
      pipe.sends.push_back(send);
    }
    return tickets_.add(std::move(send));
  }

  Ticket receive(int from, std::uint16_t channel, std::span<std::byte> bytes) override {
    auto receive = begin(from);
    receive->to = bytes;
    const std::lock_guard lock(hub_->mutex);
    Pipe& pipe = pipe_from(from, channel);
    if (pipe.sends.empty()) {
      pipe.receives.push_back(receive);
    } else {
      match(*pipe.sends.front(), *receive, from);
      pipe.sends.pop_front();
    }
    return tickets_.add(std::move(receive));
  }

  bool done(Ticket ticket) override {
    check_open();
    const OperationPointer operation = tickets_.at(ticket);
    const std::lock_guard lock(hub_->mutex);
    if (!operation->error.empty()) throw TransportError(operation->peer, operation->error);
    if (operation->matched) {
      tickets_.remove(ticket);
      return true;
    }
    if (has_left(operation->peer))
      throw TransportError(operation->peer,
                           fmt::format("loopback: {} has left", describe(operation->peer)));
    return false;
  }

  void wait(Clock::duration at_most) override {
    check_open();
    std::unique_lock lock(hub_->mutex);
    hub_->moved.wait_for(lock, at_most, [&] { return hub_->moves != seen_; });
    seen_ = hub_->moves;
  }

  void abort() noexcept override {
    if (aborted_) return;
    aborted_ = true;
    const std::lock_guard lock(hub_->mutex);
    const int self = endpoints_[rank_];
    std::erase_if(hub_->pipes, [&](const auto& entry) {
      return entry.first.generation == generation_ && entry.first.to == self;
    });
    for (auto& [key, pipe] : hub_->pipes)
      if (key.generation == generation_ && key.from == self)
        std::erase_if(pipe.sends, [](const auto& send) { return !send->matched; });
    hub_->left.emplace(generation_, self);
    note_move();
  }

 private:
  void check_open() const {
    if (aborted_) throw TransportError(-1, "loopback: the transport was aborted");
  }
  OperationPointer begin(int peer) {
    check_open();
    LOCKSTEP_CHECK(peer >= 0 && peer < size() && peer != rank_, "not another rank");
    auto operation = std::make_shared<Operation>();
    operation->peer = peer;
    return operation;
  }
  // The hub's mutex is held for all that follow.
  void note_move() {
    ++hub_->moves;
    hub_->moved.notify_all();
  }
  Pipe& pipe_to(int peer, std::uint16_t channel) {
    return hub_->pipes[{generation_, endpoints_[rank_], endpoints_[peer], channel}];
  }
  Pipe& pipe_from(int peer, std::uint16_t channel) {
    return hub_->pipes[{generation_, endpoints_[peer], endpoints_[rank_], channel}];
  }
  bool has_left(int peer) const { return hub_->left.contains({generation_, endpoints_[peer]}); }
  void match(Operation& send, Operation& receive, int sender) {
    if (send.from.size() != receive.to.size())
      receive.error = fmt::format("loopback: {} sent {} bytes where {} were expected",
                                  describe(sender), send.from.size(), receive.to.size());
    else if (!send.from.empty())
      std::memcpy(receive.to.data(), send.from.data(), send.from.size());
    send.matched = receive.matched = true;
    note_move();
  }

  const std::shared_ptr<LoopbackHub> hub_;
  const std::vector<int> endpoints_;  // by rank
  const int rank_;
  const std::uint64_t generation_;
  Tickets<OperationPointer> tickets_;
  std::uint64_t seen_ = 0;  // the hub's moves at the last wait
  bool aborted_ = false;
};

class LoopbackEndpoint final : public Endpoint {
 public:
  explicit LoopbackEndpoint(std::shared_ptr<LoopbackHub> hub) : hub_(std::move(hub)) {
    const std::lock_guard lock(hub_->mutex);
    number_ = hub_->endpoints++;
  }

  std::string_view name() const override { return "loopback"; }
  std::string address() const override { return fmt::format("{}{}", kPrefix, number_); }

  std::unique_ptr<Transport> connect(const std::vector<std::string>& addresses, int rank,
                                     const ConnectOptions& options) override {
    std::vector<int> endpoints;
    for (const std::string& address : addresses) {
      int number = -1;
      if (address.starts_with(kPrefix))
        std::from_chars(address.data() + kPrefix.size(), address.data() + address.size(), number);
      endpoints.push_back(number);
      const std::lock_guard lock(hub_->mutex);
      if (number < 0 || number >= hub_->endpoints)
        throw ConfigError(fmt::format("'{}' is no address of a loopback endpoint", address));
    }
    LOCKSTEP_CHECK(rank >= 0 && rank < static_cast<int>(endpoints.size()) &&
                   endpoints[rank] == number_);
    return std::make_unique<LoopbackTransport>(hub_, endpoints, rank, options.generation);
  }

 private:
  const std::shared_ptr<LoopbackHub> hub_;
  int number_ = 0;
};

}  // namespace

std::shared_ptr<LoopbackHub> make_loopback_hub() { return std::make_shared<LoopbackHub>(); }

std::unique_ptr<Endpoint> make_loopback_endpoint(std::shared_ptr<LoopbackHub> hub) {
  return std::make_unique<LoopbackEndpoint>(std::move(hub));
}

}  // namespace lockstep
