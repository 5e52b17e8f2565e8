// The sample ledger: which sample every position of every step holds, as a pure function. The only
// state of training data is the step; exactly-once follows. Same values on every rank, for any
// number of workers. Any thread.
#pragma once

#include <cstdint>

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

struct PositionRange {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint64_t size() const { return end - begin; }
  bool operator==(const PositionRange&) const = default;
};

// Part `part` of `parts` of [0, count): contiguous, sizes differ by at most one, the first ones
// larger.
PositionRange even_part(std::uint64_t count, std::uint64_t parts, std::uint64_t part);

class Ledger {
 public:
  struct Options {
    std::uint64_t samples = 0;  // > 0
    std::uint64_t global_batch_size =
        1;  // > 0; a step covers this many positions, the epoch's last may cover fewer
    int virtual_ranks = 1;
    std::uint64_t seed = 1;
    bool shuffle = true;
  };
  explicit Ledger(const Options& options);
  std::uint64_t steps_per_epoch() const;
  // Positions of the epoch that a virtual rank computes in a step of the epoch (step from 0). May
  // be empty at the end.
  PositionRange positions(std::uint64_t step, int virtual_rank) const;
  std::uint64_t batch_size(std::uint64_t step) const;  // samples of the whole step
  // The sample at a position of epoch `epoch` (from 0).
  class Epoch {
   public:
    Epoch(const Options& options, std::uint64_t epoch);
    std::uint64_t index(std::uint64_t position) const {
      return shuffle_ ? permutation_(position) : position;
    }

   private:
    Permutation permutation_;
    bool shuffle_;
  };
  Epoch epoch(std::uint64_t epoch) const { return Epoch(options_, epoch); }

 private:
  Options options_;
};

}  // namespace lockstep
