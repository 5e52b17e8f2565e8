// The update of one slice of shared weights: contributions summed in canonical order, divided,
// clipped, fed to the optimizer and written home through the redo journal, block by block, in one
// pass over memory. See docs/shared-weights.md.
//
// Who owns what: it keeps a view of the shared state, and scratch for a few tiles. Threads: one at
// a time; others may update other slices at the same time. No waiting: who calls it has met the
// others before and meets them afterwards.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "lockstep/collective/canonical_tree.h"
#include "lockstep/collective/kernels.h"
#include "lockstep/update/shared_state.h"

namespace lockstep {

// Where the ranks left their contributions: those of rank r (of the record's runs) begin at
// ranks[r], one slot (plan_accumulation) every `stride` floats.
struct Contributions {
  std::span<const std::span<const float>> ranks;
  std::uint64_t stride = 0;
};

class SliceUpdate {
 public:
  // Moments of a block's update at which a test may end the process.
  enum class Moment { summed, journaled, ready, half_home, home, advanced };
  using Hook = std::function<void(Moment, std::uint64_t block)>;

  SliceUpdate(UpdateSpec spec, const SharedState& state);

  // Reads the slice's contributions once and leaves the sum of squares of their sum in
  // state.squares(), a tile each. For clipping, or where finiteness is in doubt. Before decide().
  void measure(const StepRecord& record, const Contributions& contributions, std::size_t slice);
  // Of all slices, after everyone has measured: the same bits for any partition. Not finite if any
  // element of the summed gradient or of the summed float buffers is not.
  double squares() const;

  // Makes the slice's update, from wherever its progress word says that it is: the first time, or
  // in place of an owner who died (and has been fenced: nobody else may touch the slice).
  // Idempotent. Throws Error if the progress word is damaged, or the record counts on
  // contributions that are not there.
  void run(const StepRecord& record, const Contributions& contributions, std::size_t slice,
           const Hook& hook = {});

  const UpdateSpec& spec() const { return spec_; }
  const SharedState& state() const { return state_; }

 private:
  struct Piece {  // the part of a range that lies in the elements in work
    int group;
    std::uint64_t begin;
    std::uint64_t end;
  };
  struct alignas(64) Tile {
    std::array<float, kTileElements> values;
  };
  void prepare(const StepRecord& record, const Contributions& contributions);
  const float* sum(std::uint64_t begin, std::uint64_t end);
  void find_pieces(std::uint64_t begin, std::uint64_t end);
  double tile_squares(std::uint64_t tile);
  void update_into(float* journal, const StepRecord& record, std::uint64_t begin, const float* sum);
  void copy_home(const float* journal, std::uint64_t block, const Hook& hook);

  UpdateSpec spec_;
  SharedState state_;
  const UpdateKernels& kernels_;
  BinaryKernel add_;
  std::vector<int> state_arrays_;   // of each group
  std::vector<float*> homes_;       // weights, then the state arrays
  std::vector<VirtualRange> runs_;  // that plan_ is for
  CombinePlan plan_;
  std::vector<const float*> program_;  // plan_: a slot is pushed, null adds
  std::vector<const float*> stack_;
  std::vector<Tile> sums_;  // for each level of the stack
  std::vector<Piece> pieces_;
  UpdateRange range_;  // the last that was found alone
};

}  // namespace lockstep
