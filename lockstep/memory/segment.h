// The node's shared memory of one job: a memfd with a header; for each seat a control block, a
// flight recorder and an arena; and an arena of the node's own. A seat is a worker's place here,
// from its start to its end. The agent makes the segment and workers inherit the descriptor; it
// dies with its last holder and is nowhere in a file system. Everything in it is input: attach()
// checks the header before anything else is used.
//
// Owner: whoever holds the Segment keeps the mapping. Threads: the mapping may be used by any
// thread; the ranks of one group may be processes that each attached, or threads that share one
// Segment.
//
// The address range is sized once and sealed (no shrink, no growth). It is sparse: allocate()
// reserves the pages of an arena allocation before it returns, so that a lack of memory is an Error
// with the size needed, what is free and a hint, and never a SIGBUS later.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "lockstep/base/file.h"

namespace lockstep {

inline constexpr int kMaxSeats = 1024;

struct SegmentOptions {
  int seats = 1;  // 1 to kMaxSeats; where workers are replaced, more than there are workers
  // Address range of each arena; 0: the machine's memory / seats.
  std::uint64_t arena_bytes = 0;
};

struct ControlBlock;     // memory/control_block.h: what one rank shows the others
struct FlightRecorder;   // memory/flight_recorder.h: its last operations
struct GenerationBoard;  // memory/generation_board.h: who is a member

class Segment {
 public:
  // Throws ConfigError for options out of range, Error when the kernel refuses.
  static std::shared_ptr<Segment> create(const SegmentOptions& options);
  // Takes over a descriptor that somebody else made (inherited or received). Throws Error naming
  // what is wrong with it.
  static std::shared_ptr<Segment> attach(UniqueFd fd);
  ~Segment();

  int fd() const;  // close-on-exec; who hands it to a child clears the flag
  int seats() const;
  int node_arena() const { return seats(); }  // the arena that is nobody's, by number
  ControlBlock& control(int seat);
  FlightRecorder& recorder(int seat);
  GenerationBoard& board();
  // Non-zero ends every wait of every rank. Set through abort(), which also wakes the waiters.
  std::atomic<std::uint32_t>& abort_word();
  // The first reason stays. Callable from any holder of the segment, the agent included; not from a
  // signal handler.
  void abort(std::string_view reason);
  std::string abort_reason() const;  // "" while not aborted
  // The latest group that failed: (generation + 1) << 16 | the rank whose control block says why.
  std::atomic<std::uint64_t>& failed_word();
  // Makes every sleeping rank look again at what it waits for.
  void wake_all();

  // Reserves `bytes` of an arena, 64-byte aligned, zeroed. (A rank of a generation that failed
  // may still be writing there: what must stay zero is allocated when all have joined the next.)
  // Ranks that make the same calls in the same order get the same offset within their arenas
  // ("symmetric"). One thread at a time for each arena.
  std::span<std::byte> allocate(int arena, std::size_t bytes, std::string_view what);
  // The same from the arena's other end, for what is never given back.
  std::span<std::byte> allocate_lasting(int arena, std::size_t bytes, std::string_view what);
  // Gives the pages back to the system; the address range too, if `memory` is what allocate()
  // returned last. Nobody may use it any more.
  void release(int arena, std::span<std::byte> memory);
  // Makes a seat as it was at first. Its worker is dead, and nobody reads its arena any more.
  void reset(int seat);

  // Where a pointer into an arena lies, as an offset from the segment's start; -1 if it is not
  // inside any arena.
  std::int64_t offset_of(const void* pointer) const;
  int arena_owner(const void* pointer) const;  // the arena that holds it, or -1
  // The bytes of an arena at an offset that another process named: checked. Throws Error.
  std::span<std::byte> at(int arena, std::uint64_t offset, std::uint64_t bytes) const;
  // The same, of whichever arena.
  std::span<std::byte> at(std::uint64_t offset, std::uint64_t bytes) const;

 private:
  struct State;
  struct ArenaUse;  // the words that say how much of an arena is in use
  ArenaUse use_of(int arena);
  std::span<std::byte> take(int arena, std::size_t bytes, bool lasting, std::string_view what);
  explicit Segment(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace lockstep
