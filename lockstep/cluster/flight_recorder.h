// What the flight recorders in a segment tell of a job: for the report of a failure. Reads only, at
// any time, also of ranks that are dead. Any thread.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "lockstep/memory/segment.h"

namespace lockstep {

// Whether any rank has begun an operation.
bool has_flight_record(Segment& segment);
// The last 1,024 operations of every rank: {"now_ns", "ranks": [{"rank", "pid", "process",
// "operations_begun", "operations": [{…}, oldest first]}]}. Times are the monotonic clock's. Workers
// that were replaced come last, with rank -1.
nlohmann::json flight_record(Segment& segment);
// A line a rank: "rank 1 (pid 4711, dead): in operation 12 of generation 0,
// all_reduce(float32 × 10, sum), for 3.20 s".
std::string last_operations(Segment& segment);
// Writes flight_record() to `file`. What to tell the user: the last operations and where the rest
// is, or why it is not; "" if nothing was recorded.
std::string dump_flight_record(Segment& segment, const std::filesystem::path& file);

}  // namespace lockstep
