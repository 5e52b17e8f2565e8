#include "lockstep/data/ledger.h"

#include <algorithm>
#include <utility>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {

Permutation::Permutation(std::uint64_t size, std::uint64_t key) : size_(size), half_bits_(1) {
  LOCKSTEP_CHECK(size > 0);
  while (half_bits_ < 32 && (std::uint64_t{1} << (2 * half_bits_)) < size) ++half_bits_;
  for (std::uint64_t round = 0; round < std::size(round_keys_); ++round)
    round_keys_[round] = mix({key, round});
}

std::uint64_t Permutation::operator()(std::uint64_t position) const {
  LOCKSTEP_CHECK(position < size_);
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  std::uint64_t value = position;
  do {  // a bijection of the power of two; walking its cycle leads back into [0, size)
    std::uint64_t left = value >> half_bits_;
    std::uint64_t right = value & mask;
    for (const std::uint64_t key : round_keys_) {
      const std::uint64_t next = left ^ (mix({key ^ right}) & mask);
      left = right;
      right = next;
    }
    value = left << half_bits_ | right;
  } while (value >= size_);
  return value;
}

Ledger::Ledger(Options options) : options_(std::move(options)) {
  LOCKSTEP_CHECK(options_.samples > 0 && options_.global_batch_size > 0 &&
                 options_.virtual_ranks > 0);
  table_ = std::make_shared<const PartitionTable>(
      std::exchange(options_.partition, {}), options_.samples,
      static_cast<std::uint64_t>(options_.virtual_ranks), steps_per_epoch());
}

std::uint64_t Ledger::steps_per_epoch() const {
  const std::uint64_t whole = options_.samples / options_.global_batch_size;
  return whole + (options_.samples % options_.global_batch_size != 0);
}

std::uint64_t Ledger::batch_size(std::uint64_t step) const {
  LOCKSTEP_CHECK(step < steps_per_epoch());
  if (!table_->by_virtual_rank())
    return std::min(options_.global_batch_size,
                    options_.samples - step * options_.global_batch_size);
  std::uint64_t size = 0;
  for (int v = 0; v < options_.virtual_ranks; ++v) size += positions(step, v).size();
  return size;
}

PositionRange Ledger::positions(std::uint64_t step, int virtual_rank) const {
  const auto v = static_cast<std::uint64_t>(virtual_rank);
  if (table_->by_virtual_rank()) return table_->positions(step, v);
  const std::uint64_t first = step * options_.global_batch_size;
  const auto part =
      even_part(batch_size(step), static_cast<std::uint64_t>(options_.virtual_ranks), v);
  return {first + part.begin, first + part.end};
}

Ledger::Epoch Ledger::epoch(std::uint64_t number) const {
  Epoch epoch;
  epoch.table_ = table_;
  const std::uint64_t key = mix({options_.seed, number});
  epoch.draws_ = key;
  if (!options_.shuffle || table_->weighted()) return epoch;
  const std::uint64_t groups = table_->groups();
  for (std::uint64_t group = 0; group < groups; ++group)  // an empty one is never asked
    epoch.permutations_.emplace_back(std::max<std::uint64_t>(1, table_->group_size(group)),
                                     groups == 1 ? key : mix({options_.seed, number, group}));
  return epoch;
}

std::uint64_t Ledger::Epoch::index(std::uint64_t position) const {
  if (table_->weighted()) return table_->draw(mix({draws_, position}));
  PartitionTable::Place place = table_->place_of(position);
  if (!permutations_.empty()) place.place = permutations_[place.group](place.place);
  return table_->sample(place);
}

}  // namespace lockstep
