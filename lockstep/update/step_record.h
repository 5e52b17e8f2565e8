// Everything that determines an update of shared weights, as numbers: complete before the first
// weight of the step changes, so that whoever is left can finish the step. Plain data that lies in
// shared memory: what is read from there is input, see read_record().
//
// Who owns what: values. Threads: any.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/collective/canonical_tree.h"
#include "lockstep/update/optimizer.h"

namespace lockstep {

inline constexpr std::size_t kMaxGroups = 64;
inline constexpr std::size_t kMaxSlices = 1024;  // owners of slices: the ranks of a node
inline constexpr std::size_t kMaxVirtualRanks = 1024;

// A run of elements of the flat weights.
struct UpdateRange {
  static constexpr int kAverage = -1;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  // Index of the parameter group, or kAverage: float buffers, whose new value is the sum of the
  // contributions / the virtual ranks that had samples.
  int group = 0;
  bool operator==(const UpdateRange&) const = default;
};

// What is updated, the same for every step: sorted ranges that don't overlap. Elements outside all
// ranges (padding, frozen parameters) are never written.
struct UpdateSpec {
  std::uint64_t elements = 0;  // floats in the flat weights and in each contribution
  std::vector<OptimizerOptions> groups;
  std::vector<UpdateRange> ranges;

  int state_arrays() const;           // the most that any group needs
  std::uint64_t fingerprint() const;  // of elements, kinds and ranges: all but the hyper-parameters
};
// Throws ConfigError for options out of range, CHECKs the ranges.
void check(const UpdateSpec& spec);

// What a virtual rank found. A weight of zero: it had no samples.
struct VirtualLoss {
  double sum = 0;
  double weight = 0;
};

// An array of at most `Capacity`, in memory that is copied as bytes.
template <typename T, std::size_t Capacity>
struct Bounded {
  std::uint32_t size = 0;
  std::array<T, Capacity> items{};

  std::span<const T> span() const { return std::span(items).first(size); }
  std::span<T> span() { return std::span(items).first(size); }
  bool fits() const { return size <= Capacity; }
  void assign(std::span<const T> values) {
    LOCKSTEP_CHECK(values.size() <= Capacity, "a step record's list has a fixed capacity");
    size = static_cast<std::uint32_t>(values.size());
    std::copy(values.begin(), values.end(), items.begin());
  }
};

struct GroupStep {
  std::uint64_t steps = 0;  // updates made, this one included; skipped steps don't count
  StepNumbers numbers;
};

struct StepRecord {
  std::uint64_t step = 0;  // the step that the weights take; 0 is before the first
  std::uint32_t skip = 0;  // not 0: nothing changes but the step (a loss scale was too large)
  std::uint32_t averaged_over = 0;  // virtual ranks that had samples
  double total_weight = 0;
  double loss_scale = 1;
  double clip_factor = 1;
  double gradient_norm = 0;  // of the mean gradient before clipping; 0 if it was not measured
  Bounded<GroupStep, kMaxGroups> groups;
  Bounded<std::uint64_t, kMaxSlices + 1> tiles;  // slice i owns tiles [tiles[i], tiles[i + 1])
  Bounded<VirtualRange, kMaxSlices> runs;        // rank r contributed virtual ranks runs[r]
  Bounded<std::uint64_t, kMaxSlices> places;     // where, as the caller means it
  Bounded<VirtualLoss, kMaxVirtualRanks> losses;

  std::size_t slices() const { return tiles.size - 1; }
};

// What is not a matter of arithmetic. Options in the order of the spec's groups, `lr` being the
// step's.
struct StepPlan {
  std::span<const OptimizerOptions> groups;
  std::span<const VirtualRange> runs;  // who computed which virtual ranks
  std::span<const std::uint64_t> places = {};
  std::span<const VirtualLoss> losses;  // of every virtual rank
  int slices = 1;                       // in how many slices the weights are updated
  double loss_scale = 1;                // the losses were multiplied by it before backward
};
// The record of the step after `last`, with nothing clipped and nothing skipped. Every rank that is
// given the same makes the same.
StepRecord plan_step(const UpdateSpec& spec, const StepRecord& last, const StepPlan& plan);
// Clips to `max_norm` (0: doesn't) from the sum of squares of the summed gradient.
void clip(StepRecord& record, double squares, double max_norm);
void skip(StepRecord& record);  // the weights, states and buffers stay as they are

// Tiles [first, last) of each of `slices`, as even as whole tiles allow: slices + 1 bounds.
std::vector<std::uint64_t> partition_tiles(std::uint64_t elements, int slices);

// "" or what is wrong with a record for this spec: nothing in it may lead outside the memory.
std::string fault_of(const StepRecord& record, const UpdateSpec& spec);

}  // namespace lockstep
