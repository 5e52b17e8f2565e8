// A rank's operations as its flight recorder holds them: what a call becomes there, and back.
// Stateless; any thread.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/collective/call.h"
#include "lockstep/memory/flight_recorder.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

enum class OperationState { open = 0, done = 1, failed = 2 };
std::string_view name_of(OperationState state);

struct RecordedOperation {
  std::uint64_t serial = 0;  // of the rank, over all its groups, from 1
  Call call;                 // places are not kept
  std::int64_t started_at_ns = 0;
  std::string group = {};  // cut to 16 bytes; "": the group of all
  OperationState state = OperationState::open;
  std::int64_t ended_at_ns = 0;       // 0 while open; monotonic clock
  std::chrono::nanoseconds waited{};  // of that: for other ranks; 0 while open

  std::string name() const;     // "all_reduce"
  std::uint64_t bytes() const;  // of the elements that the call counts
};

// Writes one rank's operations, those of one group: claim(), begin(), end(). One thread at a time.
class OperationRecorder {
 public:
  OperationRecorder(FlightRecorder& recorder, std::string_view group);
  std::string group() const;  // as RecordedOperation's
  void claim() { serial_ = claim_record(recorder_); }
  void begin(const CallWords& call, const Tag& tag, std::int64_t now_ns);
  // Of the operation that is open; nothing if none is. True in each half of a ring, twice, for one
  // of them may be a queue's wait: what the caller wants to keep of the records must be read before
  // another half ring has gone by.
  bool end(std::int64_t now_ns, std::chrono::nanoseconds waited, OperationState state);

 private:
  FlightRecorder& recorder_;
  std::array<std::uint64_t, 2> group_{};
  std::uint64_t serial_ = 0;  // 0: none is open
};

RecordedOperation operation_from(const OperationCopy& copy);
// The operations after serial `after` that the recorder of a rank still holds, oldest first.
std::vector<RecordedOperation> recorded_operations(Segment& segment, int rank,
                                                   std::uint64_t after = 0);
// "operation 12 of generation 0, all_reduce(float32 × 10, sum, tag 'a')".
std::string describe(const RecordedOperation& operation);

}  // namespace lockstep
