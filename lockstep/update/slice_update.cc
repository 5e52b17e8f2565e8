#include "lockstep/update/slice_update.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr std::uint32_t kLargestFinite = 0x7f7fffff;

void call(const SliceUpdate::Hook& hook, SliceUpdate::Moment moment, std::uint64_t block) {
  if (hook) [[unlikely]]
    hook(moment, block);
}

// A process that is killed has executed a prefix of its instructions, and what it stored is there
// for whoever has waited for its end, on any processor. So only the compiler must keep the order:
// a release store holds back what comes before it, the fence what comes after.
void store(std::atomic<std::uint64_t>& word, const SliceProgress& progress) {
  word.store(progress.word(), std::memory_order_release);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

}  // namespace

SliceUpdate::SliceUpdate(UpdateSpec spec, const SharedState& state)
    : spec_(std::move(spec)),
      state_(state),
      kernels_(update_kernels()),
      add_(kernels().binary(Dtype::float32, Reduction::sum)),
      homes_{state.weights().data()} {
  LOCKSTEP_CHECK(spec_.fingerprint() == state.layout().fingerprint);
  for (const OptimizerOptions& group : spec_.groups)
    state_arrays_.push_back(lockstep::state_arrays(kernel_of(group)));
  for (int i = 0; i < spec_.state_arrays(); ++i) homes_.push_back(state.state(i).data());
}

void SliceUpdate::prepare(const StepRecord& record, const Contributions& contributions) {
  const auto runs = record.runs.span();
  if (!std::equal(runs.begin(), runs.end(), runs_.begin(), runs_.end())) {
    runs_.assign(runs.begin(), runs.end());
    plan_ = plan_combination(runs_, runs_.back().hi);
    stack_.resize(static_cast<std::size_t>(plan_.stack_depth));
    sums_.resize(stack_.size());
  }
  LOCKSTEP_CHECK(contributions.stride >= spec_.elements);
  program_.clear();
  for (const CombineStep& step : plan_.steps) {
    if (step.kind == CombineStep::Kind::add) {
      program_.push_back(nullptr);
      continue;
    }
    const auto rank = static_cast<std::size_t>(step.rank);
    const std::uint64_t offset = static_cast<std::uint64_t>(step.slot) * contributions.stride;
    if (rank >= contributions.ranks.size() ||
        !in_bounds(offset, spec_.elements, contributions.ranks[rank].size()))
      throw Error(fmt::format("the record of step {} counts on slot {} of rank {}, which has none",
                              record.step, step.slot, rank));
    program_.push_back(contributions.ranks[rank].data() + offset);
  }
}

// The contributions to at most a tile of elements, summed; where it lies until the next call.
const float* SliceUpdate::sum(std::uint64_t begin, std::uint64_t end) {
  std::size_t depth = 0;
  for (const float* const slot : program_) {
    if (slot != nullptr) {
      stack_[depth++] = slot + begin;
      continue;
    }
    --depth;
    float* const level = sums_[depth - 1].values.data();
    add_(level, stack_[depth - 1], stack_[depth], end - begin);
    stack_[depth - 1] = level;
  }
  return stack_[0];
}

void SliceUpdate::find_pieces(std::uint64_t begin, std::uint64_t end) {
  if (range_.begin <= begin && end <= range_.end) {
    pieces_.assign(1, {range_.group, begin, end});
    return;
  }
  pieces_.clear();
  auto range = std::upper_bound(spec_.ranges.begin(), spec_.ranges.end(), begin,
                                [](std::uint64_t at, const UpdateRange& r) { return at < r.end; });
  if (range != spec_.ranges.end()) range_ = *range;
  for (; range != spec_.ranges.end() && range->begin < end; ++range)
    pieces_.push_back({range->group, std::max(begin, range->begin), std::min(end, range->end)});
}

void SliceUpdate::measure(const StepRecord& record, const Contributions& contributions,
                          std::size_t slice) {
  prepare(record, contributions);
  LOCKSTEP_CHECK(slice < record.slices());
  const std::span<double> squares = state_.squares();
  for (std::uint64_t tile = record.tiles.items[slice]; tile < record.tiles.items[slice + 1]; ++tile)
    squares[tile] = tile_squares(tile);
}

// Of the gradients; the buffers only have to be finite.
double SliceUpdate::tile_squares(std::uint64_t tile) {
  const std::uint64_t begin = tile * kTileElements;
  const std::uint64_t end = std::min(begin + kTileElements, spec_.elements);
  const float* const summed = sum(begin, end);
  find_pieces(begin, end);
  if (pieces_.size() == 1 && pieces_[0].end - pieces_[0].begin == end - begin &&
      pieces_[0].group != UpdateRange::kAverage)
    return kernels_.tile_squares(summed, end - begin);
  // An element keeps its lane, so that the bits don't depend on how a tile is cut into ranges.
  Tile gradient{};
  double fault = 0;
  for (const Piece& piece : pieces_) {
    const std::uint64_t count = piece.end - piece.begin;
    const float* const from = summed + (piece.begin - begin);
    if (piece.group != UpdateRange::kAverage)
      std::copy_n(from, count, gradient.values.data() + (piece.begin - begin));
    else if (kernels_.magnitude_bits(from, count) > kLargestFinite)
      fault = std::numeric_limits<double>::quiet_NaN();
  }
  return kernels_.tile_squares(gradient.values.data(), kTileElements) + fault;
}

double SliceUpdate::squares() const {
  double total = 0;
  for (const double tile : state_.squares()) total += tile;
  return total;
}

void SliceUpdate::run(const StepRecord& record, const Contributions& contributions,
                      std::size_t slice, const Hook& hook) {
  LOCKSTEP_CHECK(slice < record.slices() && record.step == state_.decided());
  const std::uint64_t first = record.tiles.items[slice] * kTileBlocks;
  const SliceProgress whole = whole_slice(record, slice);
  std::atomic<std::uint64_t>& word = state_.progress_word(slice);
  SliceProgress at = SliceProgress::of(word.load(std::memory_order_acquire));
  const bool begun = at.step == record.step;
  if (at.step > record.step ||
      (begun && (at.next < first || at.next > whole.next || (at.ready && at.next == whole.next))))
    throw Error(fmt::format("the progress word of slice {} is damaged: step {}, block {}", slice,
                            at.step, at.next));
  if (!begun) at = {record.step, first, false};
  prepare(record, contributions);
  float* const journal = state_.journal(slice).data();
  const std::uint64_t last = record.skip != 0 ? 0 : whole.next;
  for (; at.next < last; at = {record.step, at.next + 1, false}) {
    const std::uint64_t begin = at.next * kBlockElements;
    const std::uint64_t end = std::min(begin + kBlockElements, spec_.elements);
    if (begin >= end) break;  // the last tile has fewer blocks
    find_pieces(begin, end);
    if (!at.ready) {
      const float* const summed = sum(begin, end);
      call(hook, Moment::summed, at.next);
      update_into(journal, record, begin, summed);
      call(hook, Moment::journaled, at.next);
      store(word, {record.step, at.next, true});
    }
    call(hook, Moment::ready, at.next);
    copy_home(journal, at.next, hook);
    call(hook, Moment::home, at.next);
    store(word, {record.step, at.next + 1, false});
    call(hook, Moment::advanced, at.next);
  }
  store(word, whole);
}

void SliceUpdate::update_into(float* journal, const StepRecord& record, std::uint64_t begin,
                              const float* sum) {
  for (const Piece& piece : pieces_) {
    const std::uint64_t at = piece.begin - begin;
    const std::uint64_t count = piece.end - piece.begin;
    if (piece.group == UpdateRange::kAverage) {
      // With no samples at all there is nothing to average: the buffers stay.
      const float divisor = static_cast<float>(record.averaged_over);
      for (std::uint64_t i = at; i < at + count; ++i)
        journal[i] = record.averaged_over != 0 ? sum[i] / divisor : homes_[0][begin + i];
      continue;
    }
    const auto group = static_cast<std::size_t>(piece.group);
    StepArrays arrays{.gradient = sum + at,
                      .weights = homes_[0] + piece.begin,
                      .states = {},
                      .new_weights = journal + at,
                      .new_states = {},
                      .count = count};
    for (std::size_t i = 0; i < static_cast<std::size_t>(state_arrays_[group]); ++i) {
      arrays.states[i] = homes_[1 + i] + piece.begin;
      arrays.new_states[i] = journal + (1 + i) * kBlockElements + at;
    }
    const StepNumbers& numbers = record.groups.items[group].numbers;
    kernels_.step(numbers.kernel)(numbers, arrays);
  }
}

void SliceUpdate::copy_home(const float* journal, std::uint64_t block, const Hook& hook) {
  for (const Piece& piece : pieces_) {
    const float* from = journal + (piece.begin - block * kBlockElements);
    const int arrays = piece.group == UpdateRange::kAverage
                           ? 1
                           : 1 + state_arrays_[static_cast<std::size_t>(piece.group)];
    for (int i = 0; i < arrays; ++i, from += kBlockElements) {
      std::memcpy(homes_[static_cast<std::size_t>(i)] + piece.begin, from,
                  (piece.end - piece.begin) * sizeof(float));
      call(hook, Moment::half_home, block);
    }
  }
}

}  // namespace lockstep
