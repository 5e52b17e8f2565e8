#include "lockstep/data/ledger.h"

#include <algorithm>

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

PositionRange even_part(std::uint64_t count, std::uint64_t parts, std::uint64_t part) {
  LOCKSTEP_CHECK(part < parts);
  const std::uint64_t each = count / parts;
  const std::uint64_t larger = count % parts;  // so many parts hold one more
  const std::uint64_t begin = part * each + std::min(part, larger);
  return {begin, begin + each + (part < larger ? 1 : 0)};
}

Ledger::Ledger(const Options& options) : options_(options) {
  LOCKSTEP_CHECK(options.samples > 0 && options.global_batch_size > 0 && options.virtual_ranks > 0);
}

std::uint64_t Ledger::steps_per_epoch() const {
  const std::uint64_t whole = options_.samples / options_.global_batch_size;
  return whole + (options_.samples % options_.global_batch_size != 0);
}

std::uint64_t Ledger::batch_size(std::uint64_t step) const {
  LOCKSTEP_CHECK(step < steps_per_epoch());
  return std::min(options_.global_batch_size, options_.samples - step * options_.global_batch_size);
}

PositionRange Ledger::positions(std::uint64_t step, int virtual_rank) const {
  const std::uint64_t first = step * options_.global_batch_size;
  const auto parts = static_cast<std::uint64_t>(options_.virtual_ranks);
  const auto part = even_part(batch_size(step), parts, static_cast<std::uint64_t>(virtual_rank));
  return {first + part.begin, first + part.end};
}

Ledger::Epoch::Epoch(const Options& options, std::uint64_t epoch)
    : permutation_(options.samples, mix({options.seed, epoch})), shuffle_(options.shuffle) {}

}  // namespace lockstep
