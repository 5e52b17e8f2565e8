#include "lockstep/collective/operation_record.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "lockstep/base/bytes.h"
#include "lockstep/memory/flight_recorder.h"

namespace lockstep {
namespace {

// The fingerprint's words, the own one, when it began, the tag, the group.
constexpr std::size_t kOwnPlace = kFingerprintWords, kStartPlace = 5, kTagPlace = 6;
constexpr std::size_t kGroupPlace = kTagPlace + Tag::kBytes / 8;
constexpr int kStateBits = 2;  // of a record's outcome; the rest is the time waited
static_assert(kGroupPlace + 2 <= std::tuple_size_v<OperationWords>);

std::string text_of(const std::uint64_t* words, std::size_t count) {
  const char* bytes = reinterpret_cast<const char*>(words);
  std::string text(bytes, std::find(bytes, bytes + count * 8, '\0'));
  for (char& byte : text)
    if (static_cast<unsigned char>(byte) < ' ') byte = '?';
  return text;
}

}  // namespace

std::string_view name_of(OperationState state) {
  constexpr std::string_view kNames[] = {"open", "done", "failed"};
  return kNames[static_cast<int>(state)];
}

RecordedOperation operation_from(const OperationCopy& copy) {
  CallWords words{};
  std::copy_n(copy.words.begin(), kFingerprintWords, words.begin());
  words[1] &= ~(std::uint64_t{0xff} << 24);  // no payload is here
  words[kPlaceWord] = words[kResultPlaceWord] = kNowhere;
  words[kOwnWord] = copy.words[kOwnPlace];
  RecordedOperation operation{.serial = copy.serial, .call = unpack(words)};
  operation.call.tag = text_of(&copy.words[kTagPlace], Tag::kBytes / 8);
  operation.started_at_ns = static_cast<std::int64_t>(copy.words[kStartPlace]);
  operation.group = text_of(&copy.words[kGroupPlace], 2);
  const auto state = static_cast<OperationState>(copy.outcome & ((1 << kStateBits) - 1));
  if (copy.ended_at_ns != 0) {
    operation.ended_at_ns = copy.ended_at_ns;
    operation.state = state == OperationState::done ? state : OperationState::failed;
    operation.waited = std::chrono::nanoseconds(copy.outcome >> kStateBits);
  }
  return operation;
}

std::string RecordedOperation::name() const {
  const std::string text = describe(call);
  return text.substr(0, text.find('('));
}

std::uint64_t RecordedOperation::bytes() const {
  if (static_cast<int>(call.dtype) >= kDtypeCount) return 0;
  return checked_multiply(call.count, size_of(call.dtype)).value_or(0);
}

OperationRecorder::OperationRecorder(FlightRecorder& recorder, std::string_view group)
    : recorder_(recorder) {
  std::memcpy(group_.data(), group.data(), std::min(group.size(), sizeof(group_)));
}

std::string OperationRecorder::group() const { return text_of(group_.data(), group_.size()); }

void OperationRecorder::begin(const CallWords& call, const Tag& tag, std::int64_t now_ns) {
  OperationWords words{};
  std::copy_n(call.begin(), kFingerprintWords, words.begin());
  words[kOwnPlace] = call[kOwnWord];
  words[kStartPlace] = static_cast<std::uint64_t>(now_ns);
  std::memcpy(&words[kTagPlace], tag.bytes().data(), Tag::kBytes);
  std::copy(group_.begin(), group_.end(), words.begin() + kGroupPlace);
  open_record(recorder_, serial_, words);
}

bool OperationRecorder::end(std::int64_t now_ns, std::chrono::nanoseconds waited,
                            OperationState state) {
  if (serial_ == 0) return false;
  close_record(
      recorder_, serial_, now_ns,
      static_cast<std::uint64_t>(waited.count()) << kStateBits | static_cast<std::uint64_t>(state));
  return std::exchange(serial_, 0) % (kRecordedOperations / 2) < 2;
}

std::vector<RecordedOperation> recorded_operations(Segment& segment, int rank,
                                                   std::uint64_t after) {
  std::vector<RecordedOperation> operations;
  for (const OperationCopy& copy : read_records(segment.recorder(rank), after))
    operations.push_back(operation_from(copy));
  return operations;
}

std::string describe(const RecordedOperation& operation) {
  return fmt::format("{}{}operation {} of generation {}, {}", operation.group,
                     operation.group.empty() ? "" : ": ", operation.call.sequence,
                     operation.call.generation, describe(operation.call));
}

}  // namespace lockstep
