// Whether a process of this machine still runs, from /proc. Stateless; any thread.
#pragma once

#include <cstdint>
#include <string_view>

namespace lockstep {

enum class ProcessState { running, stopped, dead };
std::string_view name_of(ProcessState state);  // "alive", "stopped by a signal", "dead"

// start: process_start_time() of the process meant, so that a reused pid counts as dead; 0:
// unknown.
ProcessState process_state(int pid, std::uint64_t start);
// In clock ticks since boot; 0 if unknown.
std::uint64_t process_start_time(int pid);

}  // namespace lockstep
