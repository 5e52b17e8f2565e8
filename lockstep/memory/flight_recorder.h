// The flight recorder: the last operations of one rank, in shared memory, where whoever holds the
// segment finds them after the rank was killed. A ring; record n is in slot n %
// kRecordedOperations. Every field is an atomic, and a reader treats what it finds as input.
//
// Threads: several may open and close records of one rank at the same time; a record that is closed
// when a whole ring has gone by stays open in what is left of it: nowhere. Readers may come at any
// time and skip what is being written.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lockstep {

inline constexpr std::size_t kRecordedOperations = 1024;

// What the operation is; the words' meaning is the collective layer's.
using OperationWords = std::array<std::uint64_t, 13>;

struct alignas(64) OperationRecord {
  std::atomic<std::uint64_t> serial;      // 1 for the rank's first; 0: none, or being written
  std::atomic<std::int64_t> ended_at_ns;  // 0: open; monotonic clock
  std::atomic<std::uint64_t> outcome;     // as `words`
  std::array<std::atomic<std::uint64_t>, std::tuple_size_v<OperationWords>> words;
};

struct alignas(64) FlightRecorder {
  std::atomic<std::uint64_t> opened;  // operations so far: the serial of the newest
  std::array<OperationRecord, kRecordedOperations> records;
};

// The serial of the next record, which is the caller's. Apart from open_record(), because a locked
// instruction waits for every store before it: not between an announcement and its answer.
inline std::uint64_t claim_record(FlightRecorder& recorder) {
  return recorder.opened.fetch_add(1, std::memory_order_relaxed) + 1;
}

// A few stores.
inline void open_record(FlightRecorder& recorder, std::uint64_t serial,
                        const OperationWords& words) {
  OperationRecord& record = recorder.records[serial % kRecordedOperations];
  // A reader that sees any of the new fields sees this zero too, or the new serial.
  record.serial.store(0, std::memory_order_relaxed);
  record.ended_at_ns.store(0, std::memory_order_release);
  for (std::size_t i = 0; i < words.size(); ++i)
    record.words[i].store(words[i], std::memory_order_release);
  record.serial.store(serial, std::memory_order_release);
}

inline void close_record(FlightRecorder& recorder, std::uint64_t serial, std::int64_t ended_at_ns,
                         std::uint64_t outcome) {
  OperationRecord& record = recorder.records[serial % kRecordedOperations];
  if (record.serial.load(std::memory_order_relaxed) != serial) return;  // a whole ring ago
  record.outcome.store(outcome, std::memory_order_relaxed);
  record.ended_at_ns.store(ended_at_ns, std::memory_order_release);
}

struct OperationCopy {
  std::uint64_t serial = 0;
  std::int64_t ended_at_ns = 0;  // 0: open
  std::uint64_t outcome = 0;     // once ended
  OperationWords words{};
};

// What the ring holds of the operations after `after`, oldest first: at most a ring full. Takes
// nothing on trust: a record whose serial is not its slot's, or changes meanwhile, is left out.
std::vector<OperationCopy> read_records(const FlightRecorder& recorder, std::uint64_t after = 0);

}  // namespace lockstep
