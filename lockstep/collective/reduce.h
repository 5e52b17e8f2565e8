// Runs a combination plan over memory: the executor for canonical_tree.h. And who reduces what: the
// data cut into slices. No state beyond its scratch; one thread at a time for each Reducer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lockstep/base/dtype.h"
#include "lockstep/collective/canonical_tree.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/plans.h"

namespace lockstep {

// Elements.
struct Slice {
  std::size_t first = 0, last = 0;
  std::size_t size() const { return last - first; }
};
// Of `count` elements cut into `of` chunks, those of `chunks`: whole cache lines, so that no two
// ranks write to the same one.
Slice slice_of(ChunkRange chunks, int of, std::size_t count, Dtype dtype);

// What follows from a TreeLayout; built once and kept while the layout stays the same.
struct Tree {
  TreeLayout layout;
  std::uint64_t digest = 0;
  std::vector<std::size_t> contributions;  // by rank
  CombinePlan plan;

  explicit Tree(TreeLayout of);
};
TreeLayout one_each(int size);  // one virtual rank a rank

struct ReduceJob {
  const CombinePlan& plan;
  Dtype dtype;
  Reduction reduction;
  // 16-bit types: keep the whole sum in float32 and round once (all_reduce), or round after every
  // addition, as a worker does that adds up its own slots (tree_all_reduce: the result must not
  // depend on who adds).
  bool round_once;
  std::size_t slot_bytes;  // from one slot of a rank to the next
};

class Reducer {
 public:
  // Elements [first, last) of every result = the plan's value over the ranks' slots, divided by the
  // number of ranks for mean. slots[r] is where rank r's slots begin. A result may be its rank's
  // slot 0: a tile is read everywhere before it is written anywhere.
  void run(const ReduceJob& job, std::span<const std::byte* const> slots,
           std::span<std::byte* const> results, std::size_t first, std::size_t last);
  // Bytes read from slots and written to results so far.
  std::uint64_t moved() const { return moved_; }

 private:
  std::uint64_t moved_ = 0;
  std::vector<std::byte> scratch_;       // one tile for each level of the stack
  std::vector<const std::byte*> stack_;  // where each level's tile is: in scratch_ or in a slot
};

}  // namespace lockstep
