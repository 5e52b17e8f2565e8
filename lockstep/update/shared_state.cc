#include "lockstep/update/shared_state.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr std::uint64_t kMagic = 0x73746867696577ff;
constexpr std::uint32_t kVersion = 2;
constexpr std::uint64_t kLine = 64;
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kMaxBufferBytes = std::uint64_t{1} << 40;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Header {
  std::atomic<std::uint64_t> magic;  // written last
  std::uint32_t version;
  std::uint32_t record_bytes;
  SharedLayout layout;
};

static_assert(std::is_trivially_copyable_v<StepRecord>);
static_assert(std::is_trivially_copyable_v<SharedLayout>);

}  // namespace

struct SharedState::Words {
  alignas(kLine) std::atomic<std::uint64_t> committed;
  alignas(kLine) std::atomic<std::uint64_t> decided;
};

struct SharedState::SliceWords {
  alignas(kLine) std::atomic<std::uint64_t> progress;
  std::atomic<std::uint64_t> sealed;
};

SliceProgress whole_slice(const StepRecord& record, std::size_t slice) {
  return {record.step, record.tiles.items[slice + 1] * kTileBlocks, false};
}

SharedLayout SharedLayout::of(const UpdateSpec& spec, int max_slices, std::uint64_t buffer_bytes) {
  check(spec);
  const SharedLayout layout{.elements = spec.elements,
                            .states = static_cast<std::uint64_t>(spec.state_arrays()),
                            .slices = static_cast<std::uint64_t>(max_slices),
                            .buffer_bytes = buffer_bytes,
                            .fingerprint = spec.fingerprint()};
  if (const std::string fault = layout.fault(); !fault.empty())
    throw ConfigError("shared weights: " + fault);
  return layout;
}

std::string SharedLayout::fault() const {
  if (elements > kMaxTiles * kTileElements) return fmt::format("{} elements", elements);
  if (states > kMaxStateArrays) return fmt::format("{} state arrays", states);
  if (slices < 1 || slices > kMaxSlices) return fmt::format("{} slices", slices);
  if (buffer_bytes > kMaxBufferBytes) return fmt::format("{} bytes of buffers", buffer_bytes);
  return "";
}

std::uint64_t SharedLayout::words_offset() const { return round_up(sizeof(Header), kLine); }
std::uint64_t SharedLayout::record_offset(std::uint64_t step) const {
  constexpr std::uint64_t kWords = 2 * kLine;  // SharedState::Words
  return words_offset() + kWords + slices * kLine + step % 2 * round_up(sizeof(StepRecord), kLine);
}
std::uint64_t SharedLayout::buffers_offset(std::uint64_t step) const {
  return record_offset(0) + 2 * round_up(sizeof(StepRecord), kLine) +
         step % 2 * round_up(buffer_bytes, kLine);
}
std::uint64_t SharedLayout::squares_offset() const {
  return buffers_offset(0) + 2 * round_up(buffer_bytes, kLine);
}
std::uint64_t SharedLayout::journal_offset(std::uint64_t slice) const {
  return round_up(squares_offset() + tiles() * sizeof(double), kPage) +
         slice * (1 + states) * kBlockElements * sizeof(float);
}
std::uint64_t SharedLayout::weights_offset() const {
  return round_up(journal_offset(slices), kPage);
}
std::uint64_t SharedLayout::state_offset(std::uint64_t index) const {
  return weights_offset() + (1 + index) * array_bytes();
}
std::uint64_t SharedLayout::total_bytes() const { return state_offset(states); }

SharedState SharedState::create(std::span<std::byte> memory, const UpdateSpec& spec,
                                const SharedLayout& layout, const StepRecord& committed) {
  static_assert(sizeof(Words) == 2 * kLine && sizeof(SliceWords) == kLine);
  LOCKSTEP_CHECK(reinterpret_cast<std::uintptr_t>(memory.data()) % kLine == 0 &&
                     memory.size() >= layout.total_bytes(),
                 "shared weights lie in memory of their layout's size, 64-byte aligned");
  LOCKSTEP_CHECK(layout.fault().empty() && layout.fingerprint == spec.fingerprint());
  const SharedState state(memory, layout);
  std::memcpy(memory.data() + layout.record_offset(committed.step), &committed, sizeof committed);
  for (int i = 0; i < static_cast<int>(layout.states); ++i) {
    const std::span<float> array = state.state(i);
    for (const UpdateRange& range : spec.ranges) {
      if (range.group == UpdateRange::kAverage) continue;
      const float initial = initial_state(spec.groups[static_cast<std::size_t>(range.group)]);
      if (initial != 0)  // pages are touched where they are used
        std::fill(array.begin() + static_cast<std::ptrdiff_t>(range.begin),
                  array.begin() + static_cast<std::ptrdiff_t>(range.end), initial);
    }
  }
  state.words().decided = committed.step;
  state.words().committed = committed.step;
  Header& header = *reinterpret_cast<Header*>(memory.data());
  header.version = kVersion;
  header.record_bytes = sizeof(StepRecord);
  header.layout = layout;
  header.magic.store(kMagic, std::memory_order_release);
  return state;
}

SharedState SharedState::attach(std::span<std::byte> memory) {
  const auto wrong = [](const std::string& what) {
    return Error("the memory holds no usable shared weights: " + what);
  };
  if (memory.size() < sizeof(Header))
    throw wrong(fmt::format("it has {} bytes, too few for a header", memory.size()));
  LOCKSTEP_CHECK(reinterpret_cast<std::uintptr_t>(memory.data()) % kLine == 0);
  const Header& header = *reinterpret_cast<const Header*>(memory.data());
  if (header.magic.load(std::memory_order_acquire) != kMagic)
    throw wrong("its magic number is wrong");
  if (header.version != kVersion || header.record_bytes != sizeof(StepRecord))
    throw wrong(
        fmt::format("its layout is version {}, this program's is {}: both must be built from the "
                    "same release",
                    header.version, kVersion));
  const SharedLayout layout = header.layout;  // a copy that nobody can change any more
  if (const std::string fault = layout.fault(); !fault.empty())
    throw wrong("its header says " + fault);
  if (layout.total_bytes() > memory.size())
    throw wrong(fmt::format("its header says {} bytes, but there are {}", layout.total_bytes(),
                            memory.size()));
  return SharedState(memory, layout);
}

SharedState SharedState::attach(std::span<std::byte> memory, const SharedLayout& expected) {
  const SharedState state = attach(memory);
  const auto compare = [](std::uint64_t found, std::uint64_t wanted, std::string_view what) {
    if (found != wanted)
      throw Error(
          fmt::format("the shared weights have {} {}, this module has {}: every worker "
                      "needs the same module and optimizer",
                      found, what, wanted));
  };
  const SharedLayout& found = state.layout();
  compare(found.elements, expected.elements, "elements");
  compare(found.states, expected.states, "state arrays of the optimizer");
  compare(found.slices, expected.slices, "slices at most");
  compare(found.buffer_bytes, expected.buffer_bytes, "bytes of other buffers");
  compare(found.fingerprint, expected.fingerprint, "as their ranges' fingerprint");
  return state;
}

template <typename T>
std::span<T> SharedState::array(std::uint64_t offset, std::uint64_t count) const {
  return {reinterpret_cast<T*>(memory_.data() + offset), count};
}

SharedState::Words& SharedState::words() const {
  return *reinterpret_cast<Words*>(memory_.data() + layout_.words_offset());
}
SharedState::SliceWords& SharedState::slice_words(std::uint64_t slice) const {
  LOCKSTEP_CHECK(slice < layout_.slices);
  return reinterpret_cast<SliceWords*>(memory_.data() + layout_.words_offset() +
                                       sizeof(Words))[slice];
}

std::span<float> SharedState::weights() const {
  return array<float>(layout_.weights_offset(), layout_.elements);
}
std::span<float> SharedState::state(int index) const {
  LOCKSTEP_CHECK(0 <= index && static_cast<std::uint64_t>(index) < layout_.states);
  return array<float>(layout_.state_offset(static_cast<std::uint64_t>(index)), layout_.elements);
}
std::span<std::byte> SharedState::buffers(std::uint64_t step) const {
  return array<std::byte>(layout_.buffers_offset(step), layout_.buffer_bytes);
}
std::span<double> SharedState::squares() const {
  return array<double>(layout_.squares_offset(), layout_.tiles());
}
std::span<float> SharedState::journal(std::uint64_t slice) const {
  LOCKSTEP_CHECK(slice < layout_.slices);
  return array<float>(layout_.journal_offset(slice), (1 + layout_.states) * kBlockElements);
}

std::uint64_t SharedState::committed() const {
  return words().committed.load(std::memory_order_acquire);
}
std::uint64_t SharedState::decided() const {
  return words().decided.load(std::memory_order_acquire);
}
std::uint64_t SharedState::sealed(int rank) const {
  return slice_words(static_cast<std::uint64_t>(rank)).sealed.load(std::memory_order_acquire);
}
std::atomic<std::uint64_t>& SharedState::progress_word(std::uint64_t slice) const {
  return slice_words(slice).progress;
}
SliceProgress SharedState::progress(std::uint64_t slice) const {
  return SliceProgress::of(progress_word(slice).load(std::memory_order_acquire));
}

void SharedState::seal(int rank, std::uint64_t step) const {
  slice_words(static_cast<std::uint64_t>(rank)).sealed.store(step, std::memory_order_release);
}

void SharedState::decide(const StepRecord& record) const {
  LOCKSTEP_CHECK(record.step == committed() + 1 && record.step == decided() + 1,
                 "steps are decided one by one");
  LOCKSTEP_CHECK(record.step <= kMaxStep && record.slices() <= layout_.slices);
  std::memcpy(memory_.data() + layout_.record_offset(record.step), &record, sizeof record);
  words().decided.store(record.step, std::memory_order_release);
}

StepRecord SharedState::record(std::uint64_t step, const UpdateSpec& spec) const {
  LOCKSTEP_CHECK(spec.fingerprint() == layout_.fingerprint);
  StepRecord record;
  std::memcpy(&record, memory_.data() + layout_.record_offset(step), sizeof record);
  std::string fault = fault_of(record, spec);
  if (record.step != step) fault = fmt::format("it is that of step {}", record.step);
  if (fault.empty() && record.slices() > layout_.slices)
    fault = fmt::format("it has {} slices", record.slices());
  if (!fault.empty())
    throw Error(fmt::format("the shared weights' record of step {} is damaged: {}", step, fault));
  return record;
}

void SharedState::commit(const StepRecord& record) const {
  if (committed() >= record.step) return;
  for (std::uint64_t slice = 0; slice < record.slices(); ++slice) {
    const SliceProgress found = progress(slice);
    if (found == whole_slice(record, slice)) continue;
    // Who leaves is not waited for: the others may be in the step after it already.
    if (committed() >= record.step) return;
    throw Error(fmt::format("step {} cannot be committed: slice {} is at block {} of step {}",
                            record.step, slice, found.next, found.step));
  }
  std::uint64_t last = record.step - 1;
  words().committed.compare_exchange_strong(last, record.step, std::memory_order_acq_rel);
}

StepRecord first_record(const UpdateSpec& spec, int virtual_ranks) {
  StepRecord record;
  record.groups.size = static_cast<std::uint32_t>(spec.groups.size());
  for (std::size_t i = 0; i < spec.groups.size(); ++i)
    record.groups.items[i].numbers.kernel = kernel_of(spec.groups[i]);
  record.tiles.assign(partition_tiles(spec.elements, 1));
  record.runs.assign(std::vector<VirtualRange>{{0, virtual_ranks}});
  record.losses.assign(std::vector<VirtualLoss>(static_cast<std::size_t>(virtual_ranks)));
  return record;
}

}  // namespace lockstep
