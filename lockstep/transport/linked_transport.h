// What engines beside Links have in common: who is there, who has gone, and how one leaves. Private
// to this layer. One thread.
#pragma once

#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/transport/links.h"

namespace lockstep {

class LinkedTransport : public Transport {
 public:
  int rank() const final { return rank_; }
  int size() const final { return static_cast<int>(addresses_.size()); }
  std::string describe(int peer) const final {
    const LinkAddress& address = addresses_.at(peer);
    return fmt::format("rank {} ({})", peer, host_and_port(address.host, address.port));
  }

 protected:
  struct Partner {
    bool greeted = false;
    std::uint64_t sent = 0, received = 0;  // messages
    std::string error = {};                // why it is over with him
  };

  LinkedTransport(const std::vector<LinkAddress>& addresses, int rank)
      : partners_(addresses.size()), rank_(rank), addresses_(addresses) {}

  // The peer has greeted: connects to him.
  virtual void greeted(int peer, const std::string& text) = 0;
  // Takes in what has come.
  virtual void progress() = 0;
  // Whether messages to him are on their way of which done() has not told; whether some wait for
  // his greeting of which it has.
  virtual bool is_busy(int) { return false; }
  virtual bool owes(int) { return false; }

  void check_open() const {
    if (aborted_) throw TransportError(-1, fmt::format("{}: the transport was aborted", name()));
  }
  void check_open(int peer) const {
    check_open();
    LOCKSTEP_CHECK(peer >= 0 && peer < size() && peer != rank_, "not another rank");
  }
  [[noreturn]] void fail(int peer, std::string_view why) const {
    throw TransportError(peer, fmt::format("{}: {}: {}", name(), describe(peer), why));
  }
  const std::string& host_of(int peer) const { return addresses_[peer].host; }
  bool alive(int peer) const { return peer != rank_ && partners_[peer].error.empty(); }
  // At the links: now, or if it is time.
  void look_at_links();
  void look_now_and_then() {
    if (!links_->complete() || Clock::now() - looked_ > kLooks) look_at_links();
  }
  // Until the engine's descriptor or the links have news.
  void sleep(int fd, Clock::duration at_most);
  // The peers are told how many messages there were, and what the engine still has of them goes out
  // until they leave, too.
  void leave() noexcept;

  std::optional<Links> links_;  // none after abort()
  std::vector<Partner> partners_;
  bool aborted_ = false;

 private:
  static constexpr auto kLooks = std::chrono::milliseconds(5);  // of who never waits
  static constexpr auto kLinger = std::chrono::seconds(2);

  const int rank_;
  const std::vector<LinkAddress> addresses_;
  Clock::time_point looked_{};
};

}  // namespace lockstep
