// The node's shared memory of one job: a memfd with a header, a control block for each local rank,
// and an arena for each local rank. The agent makes it and workers inherit the descriptor; it dies
// with its last holder and is nowhere in a file system. Everything in it is input: attach() checks
// the header before anything else is used.
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

#include "lockstep/base/file.h"

namespace lockstep {

struct SegmentOptions {
  int ranks = 1;  // local ranks, 1 to 1024
  std::uint64_t arena_bytes =
      0;  // address range of each rank's arena; 0: the machine's memory / ranks
};

// What one rank shows the others. Lives in shared memory; written by its rank alone except where
// said.
struct alignas(64) ControlBlock;  // defined in memory/control_block.h

class Segment {
 public:
  static std::shared_ptr<Segment> create(const SegmentOptions& options);
  // Takes over a descriptor that somebody else made (inherited or received). Throws Error naming
  // what is wrong with it.
  static std::shared_ptr<Segment> attach(UniqueFd fd);
  ~Segment();

  int fd() const;
  int ranks() const;
  ControlBlock& control(int rank);
  // Non-zero ends every wait of every rank. Set through abort(), which also wakes the waiters.
  std::atomic<std::uint32_t>& abort_word();
  void abort(std::string_view
                 reason);  // the first reason stays; callable from the agent; async-signal-unsafe
  std::string abort_reason() const;  // "" while not aborted

  // Reserves `bytes` of rank's arena, 64-byte aligned, zeroed. Ranks that make the same calls in
  // the same order get the same offset within their arenas ("symmetric"), which is what collectives
  // in place rely on.
  std::span<std::byte> allocate(int rank, std::size_t bytes, std::string_view what);

  // Where a pointer into the mapping lies, as an offset from the segment's start; -1 if it is not
  // inside any arena.
  std::int64_t offset_of(const void* pointer) const;
  int arena_owner(const void* pointer) const;  // rank whose arena holds it, or -1
  // The symmetric twin: the same offset in another rank's arena.
  std::byte* twin(const void* pointer, int rank) const;
  // Bytes at an offset that another process named: checked against the segment. Throws Error.
  std::span<const std::byte> at(std::uint64_t offset, std::uint64_t bytes) const;

 private:
  struct State;
  explicit Segment(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace lockstep
