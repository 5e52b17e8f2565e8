#include "lockstep/update/slice_update.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr std::uint32_t kLargestFinite = 0x7f7fffff;

void call(const SliceUpdate::Hook& hook, SliceUpdate::Moment moment, std::uint64_t tile) {
  if (hook) [[unlikely]]
    hook(moment, tile);
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
    : spec_(std::move(spec)), state_(state), homes_{state.weights().data()} {
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
  }
  contributions_ = contributions;
  slots_.resize(contributions.ranks.size());
  LOCKSTEP_CHECK(contributions.stride >= spec_.elements);
  for (const CombineStep& step : plan_.steps) {
    if (step.kind != CombineStep::Kind::push) continue;
    const auto rank = static_cast<std::size_t>(step.rank);
    const std::uint64_t end =
        static_cast<std::uint64_t>(step.slot) * contributions.stride + spec_.elements;
    if (rank >= contributions.ranks.size() || end > contributions.ranks[rank].size())
      throw Error(fmt::format("the record of step {} counts on slot {} of rank {}, which has none",
                              record.step, step.slot, rank));
  }
}

// The summed contributions to a tile, in tile_ or, if there is but one, where it is.
const float* SliceUpdate::sum(std::uint64_t tile) {
  const std::uint64_t offset = tile * kTileElements;
  const std::uint64_t count = std::min(kTileElements, spec_.elements - offset);
  if (plan_.steps.size() == 1) {
    const CombineStep& only = plan_.steps.front();
    return contributions_.ranks[static_cast<std::size_t>(only.rank)].data() + offset;
  }
  for (std::size_t rank = 0; rank < slots_.size(); ++rank)
    slots_[rank] = reinterpret_cast<const std::byte*>(contributions_.ranks[rank].data() + offset);
  std::byte* const result[] = {reinterpret_cast<std::byte*>(tile_.data())};
  reducer_.run({.plan = plan_,
                .dtype = Dtype::float32,
                .reduction = Reduction::sum,
                .round_once = false,
                .slot_bytes = contributions_.stride * sizeof(float)},
               slots_, result, 0, count);
  return tile_.data();
}

void SliceUpdate::find_pieces(std::uint64_t tile) {
  const std::uint64_t begin = tile * kTileElements;
  const std::uint64_t end = std::min(begin + kTileElements, spec_.elements);
  pieces_.clear();
  auto range = std::upper_bound(spec_.ranges.begin(), spec_.ranges.end(), begin,
                                [](std::uint64_t at, const UpdateRange& r) { return at < r.end; });
  for (; range != spec_.ranges.end() && range->begin < end; ++range)
    pieces_.push_back({range->group, std::max(begin, range->begin), std::min(end, range->end)});
}

void SliceUpdate::measure(const StepRecord& record, const Contributions& contributions,
                          std::size_t slice) {
  prepare(record, contributions);
  LOCKSTEP_CHECK(slice < record.slices());
  const std::span<double> squares = state_.squares();
  for (std::uint64_t tile = record.tiles.items[slice]; tile < record.tiles.items[slice + 1]; ++tile)
    squares[tile] = squares_of(sum(tile), tile);
}

// Of the gradients; the buffers only have to be finite.
double SliceUpdate::squares_of(const float* sum, std::uint64_t tile) {
  const UpdateKernels& kernels = update_kernels();
  const std::uint64_t offset = tile * kTileElements;
  find_pieces(tile);
  alignas(64) std::array<float, kTileElements> gradient{};
  double fault = 0;
  for (const Piece& piece : pieces_) {
    const std::uint64_t count = piece.end - piece.begin;
    const float* const from = sum + (piece.begin - offset);
    if (piece.group != UpdateRange::kAverage && count == kTileElements)
      return kernels.tile_squares(from, count);
    // An element keeps its lane, so that the bits don't depend on how a tile is cut into ranges.
    if (piece.group != UpdateRange::kAverage)
      std::copy_n(from, count, gradient.data() + (piece.begin - offset));
    else if (kernels.magnitude_bits(from, count) > kLargestFinite)
      fault = std::numeric_limits<double>::quiet_NaN();
  }
  return kernels.tile_squares(gradient.data(), kTileElements) + fault;
}

double SliceUpdate::squares() const {
  double total = 0;
  for (const double tile : state_.squares()) total += tile;
  return total;
}

void SliceUpdate::run(const StepRecord& record, const Contributions& contributions,
                      std::size_t slice, const Hook& hook) {
  LOCKSTEP_CHECK(slice < record.slices() && record.step == state_.decided());
  const std::uint64_t first = record.tiles.items[slice];
  const std::uint64_t last = record.tiles.items[slice + 1];
  std::atomic<std::uint64_t>& word = state_.progress_word(slice);
  SliceProgress at = SliceProgress::of(word.load(std::memory_order_acquire));
  if (at.step > record.step || (at.step == record.step && (at.next < first || at.next > last ||
                                                           (at.ready && at.next == last))))
    throw Error(fmt::format("the progress word of slice {} is damaged: step {}, tile {}", slice,
                            at.step, at.next));
  if (at.step != record.step) at = {record.step, first, false};
  if (record.skip != 0) at.next = last;
  prepare(record, contributions);
  for (; at.next < last; at = {record.step, at.next + 1, false}) {
    find_pieces(at.next);
    if (!at.ready) {
      const float* const summed = sum(at.next);
      call(hook, Moment::summed, at.next);
      update_into_journal(record, summed, at.next, slice);
      call(hook, Moment::journaled, at.next);
      store(word, {record.step, at.next, true});
    }
    call(hook, Moment::ready, at.next);
    copy_home(at.next, slice, hook);
    call(hook, Moment::home, at.next);
    store(word, {record.step, at.next + 1, false});
    call(hook, Moment::advanced, at.next);
  }
  store(word, at);
}

void SliceUpdate::update_into_journal(const StepRecord& record, const float* sum,
                                      std::uint64_t tile, std::size_t slice) {
  const std::uint64_t offset = tile * kTileElements;
  float* const journal = state_.journal(slice, 0).data();
  for (const Piece& piece : pieces_) {
    const std::uint64_t at = piece.begin - offset;
    const std::uint64_t count = piece.end - piece.begin;
    if (piece.group == UpdateRange::kAverage) {
      // With no samples at all there is nothing to average: the buffers stay.
      const float divisor = static_cast<float>(record.averaged_over);
      for (std::uint64_t i = 0; i < count; ++i)
        journal[at + i] =
            record.averaged_over != 0 ? sum[at + i] / divisor : homes_[0][piece.begin + i];
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
      arrays.new_states[i] = journal + (1 + i) * kTileElements + at;
    }
    const StepNumbers& numbers = record.groups.items[group].numbers;
    update_kernels().step(numbers.kernel)(numbers, arrays);
  }
}

void SliceUpdate::copy_home(std::uint64_t tile, std::size_t slice, const Hook& hook) {
  const std::uint64_t offset = tile * kTileElements;
  const float* const journal = state_.journal(slice, 0).data();
  for (const Piece& piece : pieces_) {
    const int states = piece.group == UpdateRange::kAverage
                           ? 0
                           : state_arrays_[static_cast<std::size_t>(piece.group)];
    for (std::size_t i = 0; i <= static_cast<std::size_t>(states); ++i) {
      std::memcpy(homes_[i] + piece.begin, journal + i * kTileElements + (piece.begin - offset),
                  (piece.end - piece.begin) * sizeof(float));
      call(hook, Moment::half_home, tile);
    }
  }
}

}  // namespace lockstep
