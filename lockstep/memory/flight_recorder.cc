#include "lockstep/memory/flight_recorder.h"

#include <algorithm>

namespace lockstep {

std::vector<OperationCopy> read_records(const FlightRecorder& recorder, std::uint64_t after) {
  const std::uint64_t opened = recorder.opened.load(std::memory_order_acquire);
  const std::uint64_t held = std::min<std::uint64_t>(opened, kRecordedOperations);
  std::vector<OperationCopy> copies;
  for (std::uint64_t i = 0; i < held; ++i) {
    const std::uint64_t serial = opened - held + 1 + i;
    if (serial <= after) continue;
    const OperationRecord& record = recorder.records[serial % kRecordedOperations];
    if (record.serial.load(std::memory_order_acquire) != serial) continue;
    OperationCopy copy{.serial = serial};
    copy.ended_at_ns = record.ended_at_ns.load(std::memory_order_acquire);
    if (copy.ended_at_ns != 0) copy.outcome = record.outcome.load(std::memory_order_acquire);
    for (std::size_t word = 0; word < copy.words.size(); ++word)
      copy.words[word] = record.words[word].load(std::memory_order_acquire);
    if (record.serial.load(std::memory_order_relaxed) == serial) copies.push_back(copy);
  }
  return copies;
}

}  // namespace lockstep
