// Waiting for ranks of other nodes, and how a wait ends.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/collective/remote_meeting.h"

namespace lockstep {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr Clock::duration kSpin = microseconds(50);
constexpr Clock::duration kFirstSlice = milliseconds(1);
constexpr Clock::duration kSlice = milliseconds(50);    // how late an end may be noticed
constexpr Clock::duration kReason = milliseconds(100);  // for who knows why a connection broke

bool is_message(const Call& call) {
  return call.operation == Operation::send || call.operation == Operation::recv;
}

}  // namespace

void RemoteMeeting::await(const Done& done, const WaitsFor& waits_for) {
  if (done()) return;
  const auto start = Clock::now();
  const auto count = [&] { statistics_.waiting += Clock::now() - start; };
  try {
    await_slowly(done, waits_for);
  } catch (...) {
    count();
    throw;
  }
  count();
}

void RemoteMeeting::await_slowly(const Done& done, const WaitsFor& waits_for) {
  if (link_->may_spin)
    for (const auto end = Clock::now() + kSpin; Clock::now() < end;)
      if (done()) return;
  is_thorough_ = true;
  for (Clock::duration slice = kFirstSlice;; slice = std::min(2 * slice, kSlice)) {
    check(done, waits_for);
    if (done()) return;
    transport().wait(std::min(slice, deadline_.remaining()));
    if (done()) return;
  }
}

void RemoteMeeting::check(const Done& done, const WaitsFor& waits_for) {
  check_generation();
  check_notices();
  for (int rank = 0; rank < size_; ++rank)
    if (peers_[rank].has_left && !done() && waits_for(rank))  // done() takes what it sent before
      fail(fmt::format("rank {} has left the group, {}", rank, last_seen(rank)));
  // A collective that we have not begun, and that the peer cannot leave without us.
  if (message_peer_ >= 0 &&
      arrived(message_peer_, peers_[message_peer_].frames, next_sequence_, 0) && !done())
    fail_between(message_peer_, peers_[message_peer_].frames);
  if (!deadline_.expired()) return;
  std::string late;
  for (int rank = 0; rank < size_; ++rank)
    if (rank != rank_ && waits_for(rank))
      late += fmt::format("{}rank {}, {}", late.empty() ? "" : "; ", rank, last_seen(rank));
  if (!done())
    fail(
        fmt::format("gave up after {:.2f} s waiting for {}", seconds(Clock::now() - began_), late));
}

void RemoteMeeting::check_generation() {
  const std::string why = is_generation_over_ ? is_generation_over_() : "";
  if (!why.empty()) fail(fmt::format("generation {} is over: {}", generation_, why));
}

void RemoteMeeting::check_notices() {
  for (int rank = 0; rank < size_; ++rank) {
    Peer& peer = peers_[rank];
    if (!peer.noticing) continue;
    try {
      if (!transport().done(*peer.noticing)) continue;
    } catch (const TransportError&) {
      peer.noticing.reset();
      throw;
    }
    peer.noticing.reset();
    std::uint32_t kind = 0, length = 0;
    std::memcpy(&kind, peer.notice.data(), sizeof(kind));
    std::memcpy(&length, peer.notice.data() + sizeof(kind), sizeof(length));
    peer.has_left = true;
    if (kind == kLeft) continue;
    std::string text(reinterpret_cast<const char*>(peer.notice.data()) + 2 * sizeof(kind),
                     std::min<std::size_t>(length, kNoticeBytes - 2 * sizeof(kind)));
    for (char& byte : text)
      if (static_cast<unsigned char>(byte) < ' ') byte = '?';
    end_with(fmt::format("rank {} ended the group: {}", rank, text));
  }
}

void RemoteMeeting::notify(std::uint32_t kind, const std::string& text) {
  const auto length = static_cast<std::uint32_t>(std::min(text.size(), kNoticeBytes - 8));
  for (int rank = 0; rank < size_; ++rank) {
    Peer& peer = peers_[rank];
    if (rank == rank_ || peer.telling) continue;
    std::memcpy(peer.notice_out.data(), &kind, sizeof(kind));
    std::memcpy(peer.notice_out.data() + sizeof(kind), &length, sizeof(length));
    std::memcpy(peer.notice_out.data() + 8, text.data(), length);
    try {
      peer.telling = transport().send(members_[rank], channel(kNotices), peer.notice_out);
    } catch (const TransportError&) {  // it is gone, and needs no notice
    }
  }
}

void RemoteMeeting::flush_notices(Clock::duration at_most, bool until_all_left) noexcept {
  const Deadline deadline = Deadline::after(at_most);
  const auto is_over = [&](std::optional<Ticket>& ticket) {
    try {
      if (ticket && transport().done(*ticket)) ticket.reset();
    } catch (const std::exception&) {  // that rank is gone
      ticket.reset();
    }
    return !ticket;
  };
  for (;;) {
    bool all = true;
    for (Peer& peer : peers_)
      all = is_over(peer.telling) && (!until_all_left || is_over(peer.noticing)) && all;
    if (all || deadline.expired()) return;
    try {
      transport().wait(std::min(kFirstSlice, deadline.remaining()));
    } catch (const std::exception&) {
      return;
    }
  }
}

void RemoteMeeting::check_open() const {
  const std::string& over = over_.empty() ? link_->over : over_;
  if (!over.empty()) throw CommError("this group ended with: " + over);
}

void RemoteMeeting::end_with(const std::string& message) {
  over_ = message;
  const Clock::time_point now = Clock::now();
  statistics_.total += now - began_;
  record_end(now, OperationState::failed);
  if (open_data_ > 0) link_->end(message);
  throw CommError(message);
}

void RemoteMeeting::fail(const std::string& what) {
  const std::string message = fmt::format("{}: {}", operation_text(), what);
  notify(kFailed, message);
  flush_notices(kReason, false);
  end_with(message);
}

void RemoteMeeting::lost(const TransportError& error) {
  // Whoever broke the connection may have said why, or the agent may know.
  for (const Deadline deadline = Deadline::after(kReason); !deadline.expired();) {
    check_generation();
    try {
      check_notices();
    } catch (const TransportError&) {
    }
    std::this_thread::sleep_for(milliseconds(1));
  }
  const auto found = std::ranges::find(members_, error.peer());
  if (found == members_.end()) fail(error.what());
  const auto rank = static_cast<int>(found - members_.begin());
  fail(fmt::format("{}, {}",
                   peers_[rank].has_left ? fmt::format("rank {} has left the group", rank)
                                         : std::string(error.what()),
                   last_seen(rank)));
}

void RemoteMeeting::fail_between(int peer, const Mailbox& box) {
  const int first = std::min(rank_, peer), second = std::max(rank_, peer);
  const auto text_of = [&](int rank) {
    return rank == rank_ ? lockstep::describe(call_) : describe(box.words, box.tag);
  };
  fail(fmt::format("the calls of two ranks differ: rank {} called {}, rank {} called {}", first,
                   text_of(first), second, text_of(second)));
}

std::string RemoteMeeting::last_seen(int rank) const {
  const Peer& peer = peers_[rank];
  const std::string who = describe_peer(rank);
  if (!peer.heard) return fmt::format("which has just joined ({})", who);
  const Call call = unpack(peer.last_words);
  return fmt::format("last seen in {} {}, {}, {:.2f} s ago ({})",
                     is_message(call) ? "message" : "operation", call.sequence,
                     describe(peer.last_words, peer.last_tag), seconds(Clock::now() - *peer.heard),
                     who);
}

std::string RemoteMeeting::operation_text() const {
  return fmt::format("{}{}rank {}, {} {} of generation {}, {}", name_, name_.empty() ? "" : ": ",
                     rank_, is_message(call_) ? "message" : "operation", call_.sequence,
                     generation_, lockstep::describe(call_));
}

}  // namespace lockstep
