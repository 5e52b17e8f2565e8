#include "lockstep/data/partition.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <unordered_map>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

using Kind = Partition::Kind;

constexpr std::array<std::string_view, 5> kNames = {"none", "range", "hash", "stratified",
                                                    "weighted"};

void check_count(Kind kind, const char* what, std::uint64_t found, std::uint64_t wanted) {
  if (found != wanted)
    throw ConfigError(
        fmt::format("partition {}: {} {} for {} samples", name_of(kind), found, what, wanted),
        "one for each sample");
}

// Keys renamed 0, 1, … in the order of their values.
std::pair<std::vector<std::uint64_t>, std::uint64_t> number_keys(
    const std::vector<std::uint64_t>& keys) {
  std::vector<std::uint64_t> distinct = keys;
  std::ranges::sort(distinct);
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  std::vector<std::uint64_t> numbers(keys.size());
  std::ranges::transform(keys, numbers.begin(), [&](std::uint64_t key) {
    return static_cast<std::uint64_t>(std::ranges::lower_bound(distinct, key) - distinct.begin());
  });
  return {std::move(numbers), distinct.size()};
}

}  // namespace

PositionRange even_part(std::uint64_t count, std::uint64_t parts, std::uint64_t part) {
  LOCKSTEP_CHECK(part < parts);
  const std::uint64_t each = count / parts;
  const std::uint64_t larger = count % parts;  // so many parts hold one more
  const std::uint64_t begin = part * each + std::min(part, larger);
  return {begin, begin + each + (part < larger ? 1 : 0)};
}

std::string_view name_of(Kind kind) { return kNames[static_cast<std::size_t>(kind)]; }

Kind partition_kind(std::string_view name) {
  const auto found = std::ranges::find(kNames, name);
  if (found == kNames.end())
    throw ConfigError(fmt::format("unknown partition \"{}\"", name),
                      "none, range, hash, stratified or weighted");
  return static_cast<Kind>(found - kNames.begin());
}

std::vector<double> balancing_weights(const std::vector<std::uint64_t>& keys) {
  std::unordered_map<std::uint64_t, std::uint64_t> counts;
  for (const std::uint64_t key : keys) ++counts[key];
  std::vector<double> weights(keys.size());
  std::ranges::transform(keys, weights.begin(), [&](std::uint64_t key) {
    return 1.0 / static_cast<double>(counts.at(key));
  });
  return weights;
}

PartitionTable::PartitionTable(Partition partition, std::uint64_t samples,
                               std::uint64_t virtual_ranks, std::uint64_t steps)
    : steps_(steps),
      by_virtual_rank_(partition.kind == Kind::range || partition.kind == Kind::hash),
      offsets_{0, samples} {
  LOCKSTEP_CHECK(samples > 0 && virtual_ranks > 0 && steps > 0);
  const Kind kind = partition.kind;
  if (kind == Kind::hash || kind == Kind::stratified)
    check_count(kind, "keys", partition.keys.size(), samples);
  if (kind == Kind::range) {
    offsets_.resize(virtual_ranks);
    for (std::uint64_t v = 0; v < virtual_ranks; ++v)
      offsets_[v] = even_part(samples, virtual_ranks, v).begin;
    offsets_.push_back(samples);
  } else if (kind == Kind::hash) {
    for (std::uint64_t& key : partition.keys) key = mix({key}) % virtual_ranks;
    group_by(partition.keys, virtual_ranks);
  } else if (kind == Kind::stratified) {
    stratify(partition.keys);
  } else if (kind == Kind::weighted) {
    check_count(kind, "weights", partition.weights.size(), samples);
    accumulate(partition.weights);
  }
  for (std::uint64_t v = 0; by_virtual_rank_ && v < virtual_ranks; ++v)
    if (group_size(v) < steps)
      throw ConfigError(
          fmt::format("partition {}: virtual rank {} of {} has {} samples for {} steps an epoch",
                      name_of(kind), v, virtual_ranks, group_size(v), steps),
          "a larger batch, fewer virtual ranks (workers), or a key with more values");
}

void PartitionTable::group_by(const std::vector<std::uint64_t>& group_of, std::uint64_t groups) {
  offsets_.assign(groups + 1, 0);
  for (const std::uint64_t group : group_of) ++offsets_[group + 1];
  std::partial_sum(offsets_.begin(), offsets_.end(), offsets_.begin());
  members_.resize(group_of.size());
  std::vector<std::uint64_t> next(offsets_.begin(), offsets_.end() - 1);
  for (std::uint64_t sample = 0; sample < group_of.size(); ++sample)
    members_[next[group_of[sample]]++] = sample;
}

// The k-th of a group of m stands at (k + 1/2) / m of the epoch.
void PartitionTable::stratify(const std::vector<std::uint64_t>& keys) {
  const auto [group_of, groups] = number_keys(keys);
  group_by(group_of, groups);
  pattern_.resize(keys.size());
  std::iota(pattern_.begin(), pattern_.end(), 0);
  std::vector<std::uint64_t> group_at(keys.size());
  for (std::uint64_t g = 0; g < groups; ++g)
    std::fill(group_at.begin() + static_cast<std::ptrdiff_t>(offsets_[g]),
              group_at.begin() + static_cast<std::ptrdiff_t>(offsets_[g + 1]), g);
  std::ranges::sort(pattern_, [&](std::uint64_t a, std::uint64_t b) {
    const std::uint64_t ga = group_at[a], gb = group_at[b];
    using Wide = unsigned __int128;
    const Wide left = Wide{2 * (a - offsets_[ga]) + 1} * group_size(gb);
    const Wide right = Wide{2 * (b - offsets_[gb]) + 1} * group_size(ga);
    return left != right ? left < right : a < b;
  });
}

void PartitionTable::accumulate(const std::vector<double>& weights) {
  double sum = 0;
  for (const double weight : weights) {
    sum += weight;
    if (!std::isfinite(sum) || weight < 0)
      throw ConfigError(fmt::format("partition weighted: the weight of sample {} is {}",
                                    cumulative_.size(), weight),
                        "finite numbers from 0");
    cumulative_.push_back(sum);
  }
  if (sum <= 0) throw ConfigError("partition weighted: all weights are 0");
}

PositionRange PartitionTable::positions(std::uint64_t step, std::uint64_t virtual_rank) const {
  const PositionRange part = even_part(group_size(virtual_rank), steps_, step);
  return {offsets_[virtual_rank] + part.begin, offsets_[virtual_rank] + part.end};
}

PartitionTable::Place PartitionTable::place_of(std::uint64_t position) const {
  const std::uint64_t at = pattern_.empty() ? position : pattern_[position];
  LOCKSTEP_CHECK(at < offsets_.back());
  const auto group = std::ranges::upper_bound(offsets_, at) - offsets_.begin() - 1;
  return {static_cast<std::uint64_t>(group), at - offsets_[static_cast<std::size_t>(group)]};
}

std::uint64_t PartitionTable::sample(Place place) const {
  const std::uint64_t at = offsets_[place.group] + place.place;
  return members_.empty() ? at : members_[at];
}

std::uint64_t PartitionTable::draw(std::uint64_t random) const {
  const double target = std::ldexp(static_cast<double>(random >> 11), -53) * cumulative_.back();
  // Rounding may bring the target to the sum itself; a sample of weight 0 is never above it.
  const auto found = std::ranges::upper_bound(cumulative_, target);
  const auto last = std::ranges::lower_bound(cumulative_, cumulative_.back());
  return static_cast<std::uint64_t>(std::min(found, last) - cumulative_.begin());
}

}  // namespace lockstep
