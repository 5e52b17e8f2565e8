// For tests alone: a transport over another one, with faults. Sends are counted from 0.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "lockstep/transport/tickets.h"
#include "lockstep/transport/transport.h"

namespace lockstep {

struct Faults {
  int drop_send = -1;      // never arrives, though done() says that it was sent
  int truncate_send = -1;  // arrives without its last byte
  int break_at_send = -1;  // throws, then and for ever after: this rank's connections are gone
  // How long a send is held back: messages to different peers overtake one another, those to one
  // peer don't.
  std::function<Clock::duration(int to, int send)> delay = {};
};

class FaultyTransport final : public Transport {
 public:
  FaultyTransport(std::unique_ptr<Transport> inner, Faults faults)
      : inner_(std::move(inner)), faults_(std::move(faults)) {}

  std::string_view name() const override { return "faulty"; }
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string describe(int peer) const override { return inner_->describe(peer); }

  Ticket send(int to, std::uint16_t channel, std::span<const std::byte> bytes) override {
    const int number = sends_++;
    if (number == faults_.break_at_send) inner_->abort();
    if (number == faults_.truncate_send && !bytes.empty()) bytes = bytes.first(bytes.size() - 1);
    const Ticket ticket = tickets_.add({});
    if (number == faults_.drop_send) {
      tickets_.at(ticket).dropped = true;
      return ticket;
    }
    const auto delay = faults_.delay ? faults_.delay(to, number) : Clock::duration::zero();
    held_[to].push_back({Clock::now() + delay, channel, bytes, ticket});
    release();
    return ticket;
  }
  Ticket receive(int from, std::uint16_t channel, std::span<std::byte> bytes) override {
    return tickets_.add({.inner = inner_->receive(from, channel, bytes)});
  }
  bool done(Ticket ticket) override {
    release();
    const Operation& operation = tickets_.at(ticket);
    if (!operation.dropped && (!operation.inner || !inner_->done(*operation.inner))) return false;
    tickets_.remove(ticket);
    return true;
  }
  void wait(Clock::duration at_most) override {
    const Clock::time_point now = Clock::now();
    for (const auto& [peer, sends] : held_)
      if (!sends.empty())
        at_most = std::min(at_most, std::max(sends.front().due - now, Clock::duration::zero()));
    inner_->wait(at_most);
    release();
  }
  void abort() noexcept override {
    held_.clear();
    inner_->abort();
  }

 private:
  struct Operation {
    std::optional<Ticket> inner = {};
    bool dropped = false;
  };
  struct Held {
    Clock::time_point due;
    std::uint16_t channel = 0;
    std::span<const std::byte> bytes;
    Ticket ticket = 0;
  };
  void release() {
    const Clock::time_point now = Clock::now();
    for (auto& [peer, sends] : held_)
      for (; !sends.empty() && sends.front().due <= now; sends.pop_front())
        tickets_.at(sends.front().ticket).inner =
            inner_->send(peer, sends.front().channel, sends.front().bytes);
  }

  std::unique_ptr<Transport> inner_;
  Faults faults_;
  Tickets<Operation> tickets_;
  std::map<int, std::deque<Held>> held_;  // by peer
  int sends_ = 0;
};

}  // namespace lockstep
