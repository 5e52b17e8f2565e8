// Whether a process of this machine still runs, from /proc. Stateless; any thread.
#pragma once

#include <cstdint>

namespace lockstep {

enum class ProcessState { running, stopped, dead };

// start: process_start_time() of the process meant, so that a reused pid counts as dead; 0:
// unknown.
ProcessState process_state(int pid, std::uint64_t start);
// In clock ticks since boot; 0 if unknown.
std::uint64_t process_start_time(int pid);

}  // namespace lockstep
