// The sample ledger: which sample every position of every step holds, as a pure function. The only
// state of training data is the step; exactly-once follows. Same values on every rank, for any
// number of workers. Any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "lockstep/data/partition.h"

namespace lockstep {

// A keyed permutation of [0, size): a balanced Feistel network over the next even power of two,
// with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Fixed for
// ever.
class Permutation {
 public:
  Permutation(std::uint64_t size, std::uint64_t key);
  std::uint64_t operator()(std::uint64_t position) const;  // position < size
  std::uint64_t size() const { return size_; }

 private:
  std::uint64_t size_;
  std::uint64_t round_keys_[6];
  int half_bits_;
};

class Ledger {
 public:
  struct Options {
    std::uint64_t samples = 0;  // > 0
    std::uint64_t global_batch_size =
        1;  // > 0; a step covers this many positions, the epoch's last may cover fewer
    int virtual_ranks = 1;
    std::uint64_t seed = 1;
    bool shuffle = true;
    Partition partition = {};
  };
  // Throws ConfigError for a partition that does not fit.
  explicit Ledger(Options options);
  std::uint64_t steps_per_epoch() const;
  bool by_virtual_rank() const { return table_->by_virtual_rank(); }  // else one order for all
  // Positions of the epoch that a virtual rank computes in a step of the epoch (step from 0). May
  // be empty at the end.
  PositionRange positions(std::uint64_t step, int virtual_rank) const;
  std::uint64_t batch_size(std::uint64_t step) const;  // samples of the whole step
  // The sample at a position of epoch `epoch` (from 0).
  class Epoch {
   public:
    std::uint64_t index(std::uint64_t position) const;

   private:
    friend class Ledger;
    std::shared_ptr<const PartitionTable> table_;
    std::vector<Permutation> permutations_;  // one a group; none: in order
    std::uint64_t draws_ = 0;                // the key of weighted's
  };
  Epoch epoch(std::uint64_t epoch) const;

 private:
  Options options_;  // without the partition
  std::shared_ptr<const PartitionTable> table_;
};

}  // namespace lockstep
