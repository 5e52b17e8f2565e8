// Partitions: which samples go together, where the plain order of the ledger (ledger.h) mixes them
// all. Each is a pure function of the position, of (seed, epoch) and of what is known of the
// samples, so that exactly-once stays a consequence of it. Immutable once made; any thread.
//
// range       virtual rank v of V has the v-th V-th of the samples, in every epoch: neighbours on
// disk. hash        it has the samples whose key hashes to v: all of a key's samples go to one
// virtual rank. stratified  every run of positions, so every batch and every virtual rank's part of
// it, has each
//             key's samples in proportion, to within one.
// weighted    every position is a draw with replacement, sample i with probability weight[i] / sum:
//             an epoch has as many positions as samples, but not every sample.
// All but weighted take every sample exactly once an epoch. range and hash spread a virtual rank's
// samples evenly over the steps, whose sizes then differ by up to V.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace lockstep {

struct PositionRange {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint64_t size() const { return end - begin; }
  bool operator==(const PositionRange&) const = default;
};

// Part `part` of `parts` of [0, count): contiguous, sizes differ by at most one, the first ones
// larger.
PositionRange even_part(std::uint64_t count, std::uint64_t parts, std::uint64_t part);

struct Partition {
  enum class Kind : std::uint8_t { none, range, hash, stratified, weighted };
  Kind kind = Kind::none;
  std::vector<std::uint64_t> keys = {};  // hash, stratified: one a sample; equal keys go together
  std::vector<double> weights = {};      // weighted: one a sample, finite, not negative, not all 0
};
// "none", "range", …
std::string_view name_of(Partition::Kind kind);
Partition::Kind partition_kind(
    std::string_view name);  // throws ConfigError with the nearest as hint
// Weights that give every key the same share of the draws: 1 / (how many samples have the key).
std::vector<double> balancing_weights(const std::vector<std::uint64_t>& keys);

// A partition made ready for a number of samples, virtual ranks and steps. Samples fall into groups
// (range, hash: the virtual ranks; stratified: the keys; none: one), each shuffled in itself.
class PartitionTable {
 public:
  // Throws ConfigError: keys or weights that are missing or too many, a weight that is none, a
  // virtual rank with fewer samples than there are steps.
  PartitionTable(Partition partition, std::uint64_t samples, std::uint64_t virtual_ranks,
                 std::uint64_t steps);

  bool by_virtual_rank() const { return by_virtual_rank_; }
  // by_virtual_rank(): a step's positions of one.
  PositionRange positions(std::uint64_t step, std::uint64_t virtual_rank) const;

  std::uint64_t groups() const { return offsets_.size() - 1; }
  std::uint64_t group_size(std::uint64_t group) const {
    return offsets_[group + 1] - offsets_[group];
  }
  // Where a position lies: the place-th of a group, before that is shuffled.
  struct Place {
    std::uint64_t group = 0;
    std::uint64_t place = 0;
  };
  Place place_of(std::uint64_t position) const;
  std::uint64_t sample(Place place) const;

  bool weighted() const { return !cumulative_.empty(); }
  std::uint64_t draw(std::uint64_t random) const;  // weighted(): the sample for 64 random bits

 private:
  void group_by(const std::vector<std::uint64_t>& group_of, std::uint64_t groups);
  void stratify(const std::vector<std::uint64_t>& keys);
  void accumulate(const std::vector<double>& weights);

  std::uint64_t steps_;
  bool by_virtual_rank_;
  std::vector<std::uint64_t> offsets_;  // group g's members: [offsets_[g], offsets_[g + 1])
  std::vector<std::uint64_t> members_;  // samples by group; empty: in their own order
  std::vector<std::uint64_t> pattern_;  // stratified: position -> offset into the groups
  std::vector<double> cumulative_;      // weighted: sums of the weights so far
};

}  // namespace lockstep
