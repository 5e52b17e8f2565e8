#include "lockstep/update/step_record.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

// Where a summed gradient becomes the mean one: divided once.
void set_gradient_scale(StepRecord& record) {
  double scale = record.total_weight > 0 ? 1.0 / record.total_weight : 0.0;
  scale = scale / record.loss_scale * record.clip_factor;
  for (GroupStep& group : record.groups.span())
    group.numbers.gradient_scale = static_cast<float>(scale);
}

std::uint64_t tiles_of(std::uint64_t elements) {
  return elements / kTileElements + (elements % kTileElements != 0 ? 1 : 0);
}

}  // namespace

int UpdateSpec::state_arrays() const {
  int most = 0;
  for (const OptimizerOptions& group : groups)
    most = std::max(most, lockstep::state_arrays(kernel_of(group)));
  return most;
}

std::uint64_t UpdateSpec::fingerprint() const {
  std::uint64_t hash = mix({elements, groups.size(), ranges.size()});
  for (const OptimizerOptions& group : groups)
    hash = mix({hash, static_cast<std::uint64_t>(kernel_of(group))});
  for (const UpdateRange& range : ranges)
    hash = mix({hash, range.begin, range.end, static_cast<std::uint64_t>(range.group)});
  return hash;
}

void check(const UpdateSpec& spec) {
  if (spec.groups.size() > kMaxGroups)
    throw ConfigError(fmt::format("{} parameter groups", spec.groups.size()),
                      fmt::format("there can be {}", kMaxGroups));
  for (std::size_t group = 0; group < spec.groups.size(); ++group)
    check(spec.groups[group], fmt::format("parameter group {}", group));
  std::uint64_t end = 0;
  for (const UpdateRange& range : spec.ranges) {
    LOCKSTEP_CHECK(end <= range.begin && range.begin <= range.end && range.end <= spec.elements,
                   "ranges are sorted, apart and inside the weights");
    LOCKSTEP_CHECK(
        UpdateRange::kAverage <= range.group && range.group < static_cast<int>(spec.groups.size()),
        "a range names a group");
    end = range.end;
  }
}

StepRecord plan_step(const UpdateSpec& spec, const StepRecord& last, const StepPlan& plan) {
  LOCKSTEP_CHECK(plan.groups.size() == spec.groups.size() && last.groups.size == spec.groups.size(),
                 "every group has its options");
  StepRecord record;
  record.step = last.step + 1;
  record.loss_scale = plan.loss_scale;
  for (const VirtualLoss& loss : plan.losses) {
    record.total_weight += loss.weight;
    record.averaged_over += loss.weight > 0 ? 1 : 0;
  }
  record.groups.size = last.groups.size;
  for (std::size_t i = 0; i < plan.groups.size(); ++i) {
    GroupStep& group = record.groups.items[i];
    group.steps = last.groups.items[i].steps + 1;
    group.numbers = step_numbers(plan.groups[i], group.steps, 1.0f);
  }
  record.tiles.assign(partition_tiles(spec.elements, plan.slices));
  record.runs.assign(plan.runs);
  record.places.assign(plan.places);
  record.losses.assign(plan.losses);
  set_gradient_scale(record);
  return record;
}

void clip(StepRecord& record, double squares, double max_norm) {
  const double divisor = record.total_weight * record.loss_scale;
  record.gradient_norm = divisor > 0 ? std::sqrt(squares) / divisor : 0.0;
  if (max_norm > 0 && record.gradient_norm > max_norm)
    record.clip_factor = max_norm / record.gradient_norm;
  set_gradient_scale(record);
}

void skip(StepRecord& record) {
  LOCKSTEP_CHECK(record.skip == 0);
  record.skip = 1;
  for (GroupStep& group : record.groups.span()) --group.steps;
}

std::vector<std::uint64_t> partition_tiles(std::uint64_t elements, int slices) {
  LOCKSTEP_CHECK(1 <= slices && slices <= static_cast<int>(kMaxSlices));
  const std::uint64_t tiles = tiles_of(elements);
  const auto n = static_cast<std::uint64_t>(slices);
  std::vector<std::uint64_t> bounds;
  for (std::uint64_t i = 0; i <= n; ++i) bounds.push_back(tiles / n * i + std::min(i, tiles % n));
  return bounds;
}

std::string fault_of(const StepRecord& record, const UpdateSpec& spec) {
  if (!record.groups.fits() || !record.tiles.fits() || !record.runs.fits() ||
      !record.places.fits() || !record.losses.fits())
    return "a list is longer than its capacity";
  if (record.groups.size != spec.groups.size())
    return fmt::format("it has {} parameter groups, not {}", record.groups.size,
                       spec.groups.size());
  for (std::size_t i = 0; i < spec.groups.size(); ++i)
    if (record.groups.items[i].numbers.kernel != kernel_of(spec.groups[i]))
      return fmt::format("parameter group {} has another optimizer", i);
  const auto tiles = record.tiles.span();
  if (tiles.size() < 2 || tiles.front() != 0 || tiles.back() != tiles_of(spec.elements) ||
      !std::is_sorted(tiles.begin(), tiles.end()))
    return "its slices don't cover the weights";
  int next = 0;
  for (const VirtualRange& run : record.runs.span()) {
    if (run.lo != next || run.hi < run.lo) return "its virtual ranks are not contiguous";
    next = run.hi;
  }
  if (next < 1 || static_cast<std::size_t>(next) != record.losses.size)
    return "its runs don't cover its virtual ranks";
  return "";
}

}  // namespace lockstep
