// What lies in shared memory for one set of shared weights: a header, words, two step records, the
// redo journals, the weights and the optimizer's state. It knows no tensor and no group; the caller
// gives it memory. docs/shared-weights.md explains the protocol.
//
// Who owns what: the memory is the caller's and outlives the SharedState, which is a view; any
// process that maps the memory may have one. Threads: the words are atomic. A slice's journal and
// tiles belong to whoever updates that slice; records to whoever decides a step.
//
// Everything in the memory is input. The places of things follow from a Layout that attach() has
// checked; records and words are checked when they are read: Error, never a fault.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "lockstep/update/step_record.h"

namespace lockstep {

// What is journaled at once: a part of a tile. Small, so that journal, sums and what they are made
// from stay in the first-level cache, and all streams from memory advance together: with 1,024
// elements the journal costs half of the update pass, with 128 a few per cent.
inline constexpr std::uint64_t kBlockElements = 128;
inline constexpr std::uint64_t kTileBlocks = kTileElements / kBlockElements;

// How far a slice's update is, in one 64-bit word.
struct SliceProgress {
  std::uint64_t step = 0;  // of the record that it works on
  std::uint64_t next = 0;  // the block in work; every block of the slice before it is home
  bool ready = false;      // the journal holds all of that block's new values

  static SliceProgress of(std::uint64_t word) {
    return {word >> 32, (word >> 1) & 0x7fffffff, (word & 1) != 0};
  }
  std::uint64_t word() const { return step << 32 | next << 1 | (ready ? 1 : 0); }
  bool operator==(const SliceProgress&) const = default;
};
// The slice has taken the record's step.
SliceProgress whole_slice(const StepRecord& record, std::size_t slice);
inline constexpr std::uint64_t kMaxStep = 0xffffffff;
inline constexpr std::uint64_t kMaxTiles = 0x7fffffff / kTileBlocks;

// Everything's place, from a few numbers.
struct SharedLayout {
  std::uint64_t elements = 0;
  std::uint64_t states = 0;        // state arrays, 0 to kMaxStateArrays
  std::uint64_t slices = 0;        // the most slices that a step may have, 1 to kMaxSlices
  std::uint64_t buffer_bytes = 0;  // of the caller's other buffers (integers)
  std::uint64_t fingerprint = 0;   // UpdateSpec's

  static SharedLayout of(const UpdateSpec& spec, int max_slices, std::uint64_t buffer_bytes = 0);
  std::string fault() const;  // "" or which number is out of range
  std::uint64_t tiles() const { return (elements + kTileElements - 1) / kTileElements; }
  std::uint64_t array_bytes() const { return tiles() * kTileElements * sizeof(float); }

  // Offsets in bytes; multiples of 64, those of weights and states of 4,096.
  std::uint64_t words_offset() const;
  std::uint64_t record_offset(std::uint64_t step) const;   // two, in turn
  std::uint64_t buffers_offset(std::uint64_t step) const;  // two, in turn
  std::uint64_t squares_offset() const;
  std::uint64_t journal_offset(std::uint64_t slice) const;
  std::uint64_t weights_offset() const;
  std::uint64_t state_offset(std::uint64_t index) const;
  std::uint64_t total_bytes() const;
  bool operator==(const SharedLayout&) const = default;
};

class SharedState {
 public:
  // `memory` is zeroed, 64-byte aligned, layout.total_bytes() large. `committed` is the record of
  // the state that the caller then writes into weights(), state() and buffers(): first_record(), or
  // a checkpoint's. Nobody attaches before create() has returned.
  static SharedState create(std::span<std::byte> memory, const UpdateSpec& spec,
                            const SharedLayout& layout, const StepRecord& committed);
  // Throws Error naming what is wrong, or how it differs from the layout that the caller expects.
  static SharedState attach(std::span<std::byte> memory, const SharedLayout& expected);
  // For who knows nothing of the module, as the agent: any valid layout.
  static SharedState attach(std::span<std::byte> memory);

  const SharedLayout& layout() const { return layout_; }
  std::span<float> weights() const;         // `elements`, then zeroes up to a whole tile
  std::span<float> state(int index) const;  // likewise
  // The caller's other buffers as they are after `step`: written before decide(step's record).
  std::span<std::byte> buffers(std::uint64_t step) const;
  std::span<double> squares() const;                    // of the summed gradient, a tile each
  std::span<float> journal(std::uint64_t slice) const;  // a block of weights, then of each state

  // --- Words ---
  // The step that all weights have taken: what a reader of them waits for.
  std::uint64_t committed() const;
  std::uint64_t decided() const;  // committed(), or one more while an update is under way
  std::uint64_t sealed(int rank) const;
  SliceProgress progress(std::uint64_t slice) const;
  std::atomic<std::uint64_t>& progress_word(std::uint64_t slice) const;

  // Rank's contribution to `step` is complete; its slots are read-only until `step` is committed.
  void seal(int rank, std::uint64_t step) const;
  // Publishes a record, one rank's task: from now on the step happens. The others take it from
  // record() after a meeting.
  void decide(const StepRecord& record) const;
  // A checked copy of the record of step committed() or decided().
  StepRecord record(std::uint64_t step, const UpdateSpec& spec) const;
  // The step is whole; throws Error if a slice has not taken it. Every rank may call it after the
  // same meeting; the first changes the word. One that leaves may be late: others are at work on
  // the next step then.
  void commit(const StepRecord& record) const;

 private:
  SharedState(std::span<std::byte> memory, const SharedLayout& layout)
      : memory_(memory), layout_(layout) {}
  struct Words;
  struct SliceWords;
  Words& words() const;
  SliceWords& slice_words(std::uint64_t slice) const;
  template <typename T>
  std::span<T> array(std::uint64_t offset, std::uint64_t count) const;

  std::span<std::byte> memory_;
  SharedLayout layout_;
};

// The record before the first step: no group has made an update.
StepRecord first_record(const UpdateSpec& spec, int virtual_ranks = 1);

}  // namespace lockstep
