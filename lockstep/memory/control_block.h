// What one rank shows the others, in shared memory: how far it is, what it is doing, who it is.
// Every field is an atomic, because another process may read it at any time, and every reader
// treats what it finds as input. Written by its rank alone, except `waiting`,
// `bell` and `message_taken`. All zero until its rank has joined a group.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace lockstep {

// Text in shared memory, cut to what fits.
template <std::size_t Capacity>
class SharedText {
 public:
  void set(std::string_view text) {
    const std::size_t size = std::min(text.size(), Capacity);
    for (std::size_t i = 0; i < size; ++i) bytes_[i].store(text[i], std::memory_order_relaxed);
    size_.store(static_cast<std::uint32_t>(size), std::memory_order_release);
  }
  // Control characters, which only a broken writer leaves, are shown as '?'.
  std::string get() const {
    const std::size_t size = std::min<std::size_t>(size_.load(std::memory_order_acquire), Capacity);
    std::string text(size, '?');
    for (std::size_t i = 0; i < size; ++i) {
      const char byte = bytes_[i].load(std::memory_order_relaxed);
      if (static_cast<unsigned char>(byte) >= ' ') text[i] = byte;
    }
    return text;
  }

 private:
  std::atomic<std::uint32_t> size_;
  std::array<std::atomic<char>, Capacity> bytes_;
};

// A call as its rank announced it; the words' meaning is the collective layer's. Word 0 is written
// last, grows, and says that the others are there.
struct alignas(64) CallLine {
  std::array<std::atomic<std::uint64_t>, 8> words;
};

inline constexpr std::size_t kSharedInputBytes = 16 << 10;

struct alignas(64) ControlBlock {
  // Call n is in n % 2: a rank may be one call ahead of its readers. Joins have two lines of their
  // own, by generation: a rank may join the next while another still reads this one's last call.
  CallLine calls[2];
  CallLine joins[2];
  // A copy of a small call's input, likewise. Here, not in the arena: its rank may have left the
  // group when others read it.
  struct alignas(64) {
    std::byte bytes[kSharedInputBytes];
  } inputs[2];

  // How many further meetings within calls this rank has reached: the generation in the upper
  // bits, so that the word only ever grows.
  alignas(64) std::atomic<std::uint64_t> phase;

  alignas(64) std::atomic<std::uint32_t> waiting;  // not 0: somebody sleeps on `bell`
  std::atomic<std::uint32_t> bell;                 // changes when sleepers must look again

  alignas(64) std::atomic<std::uint64_t> joined;  // generation + 1
  std::atomic<std::uint64_t> left;                // generation + 1, once its group is gone
  std::atomic<std::int32_t> pid;
  std::atomic<std::uint32_t> expedites;      // whether the others' membarrier() reaches it
  std::atomic<std::uint64_t> process_start;  // in clock ticks since boot: tells a reused pid
  std::atomic<std::uint64_t> arena_used;     // from the arena's beginning
  std::atomic<std::uint64_t> arena_lasting;  // from its end: what is never given back
  std::atomic<std::uint64_t> progress;       // grows while its worker gets on with its work
  std::array<std::atomic<std::uint64_t>, 16> cores;  // those that it may run on, a bit each

  // A message to or from one other rank, while this rank is in such a call.
  CallLine message;
  std::atomic<std::uint64_t> message_turn;    // who it is with and its number; 0: no message
  std::atomic<std::uint64_t> message_staged;  // sender: how many chunks can be read
  alignas(64) std::atomic<std::uint64_t> message_taken;  // and were; the receiver writes it here

  SharedText<1000> failure;
};

static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

// Sleeps until the bell changes from `seen`, or about `timeout` has passed. The caller reads the
// bell, sets `waiting`, and then looks once more at what it waits for.
void sleep_on(std::atomic<std::uint32_t>& bell, std::uint32_t seen,
              std::chrono::nanoseconds timeout);
void ring(std::atomic<std::uint32_t>& bell);

}  // namespace lockstep
