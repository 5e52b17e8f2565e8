// Messages between two ranks: how they meet without the others.
#include <fmt/format.h>

#include <algorithm>

#include "lockstep/collective/rendezvous.h"

namespace lockstep {
namespace {

// ControlBlock::message_turn of message `number` with `peer`.
std::uint64_t turn_of(int peer, std::uint64_t number) {
  return static_cast<std::uint64_t>(peer + 1) << 48 | number;
}

}  // namespace

CallWords Rendezvous::begin_message(int peer, const Call& call, const CallOptions& options) {
  open(call, messages_[peer], options);
  const std::uint64_t number = messages_[peer]++;
  const CallWords mine = pack(call_);
  ControlBlock& own = block(rank_);
  const ControlBlock& other = block(peer);
  const bool sends = call_.operation == Operation::send;
  for (std::size_t i = 0; i < mine.size(); ++i)
    own.message.words[i].store(mine[i], std::memory_order_relaxed);
  own.message_staged.store(1, std::memory_order_relaxed);
  own.message_taken.store(0, std::memory_order_relaxed);
  own.message_turn.store(turn_of(peer, number), std::memory_order_release);
  announce();
  record_begin(mine, options);
  const auto is_there = [&] { return other.message_turn.load() == turn_of(rank_, number); };
  // A receiver that has taken all may be in another call by now.
  await(peer, true, [&] { return is_there() || (sends && own.message_taken.load() != 0); });
  CallWords theirs;
  for (std::size_t i = 0; i < theirs.size(); ++i)
    theirs[i] = other.message.words[i].load(std::memory_order_acquire);
  if (!is_there() && sends) return mine;
  if (!same_message(mine, theirs)) {
    const int first = std::min(rank_, peer), second = std::max(rank_, peer);
    fail(fmt::format("the calls of two ranks differ: rank {} called {}, rank {} called {}", first,
                     quote(first, first == rank_ ? mine : theirs), second,
                     quote(second, second == rank_ ? mine : theirs)));
  }
  return sends ? mine : theirs;
}

void Rendezvous::set_staged(std::uint64_t chunks) {
  block(rank_).message_staged.store(chunks, std::memory_order_release);
  announce();
}

void Rendezvous::await_taken(int peer, std::uint64_t chunks) {
  await(peer, true, [&] { return block(rank_).message_taken.load() >= chunks; });
}

void Rendezvous::await_staged(int peer, std::uint64_t chunks) {
  await(peer, true, [&] { return block(peer).message_staged.load() >= chunks; });
}

void Rendezvous::set_taken(int peer, std::uint64_t chunks) {
  block(peer).message_taken.store(chunks, std::memory_order_release);
  announce();
}

void Rendezvous::end_message(std::uint64_t bytes) {
  check_ended();  // as in meet()
  end(bytes);
  block(rank_).message_turn.store(0, std::memory_order_release);
}

}  // namespace lockstep
