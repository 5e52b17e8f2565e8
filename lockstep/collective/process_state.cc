#include "lockstep/collective/process_state.h"

#include <signal.h>

#include <cerrno>
#include <sstream>
#include <string>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"

namespace lockstep {
namespace {

struct Stat {
  char state = '?';
  std::uint64_t start = 0;
};

// proc(5): "pid (name) state ppid …", start time being field 22. The name may hold anything.
Stat read_stat(int pid) {
  Stat stat;
  try {
    const std::string text = read_text_file("/proc/" + std::to_string(pid) + "/stat");
    const auto name_end = text.rfind(')');
    if (name_end == text.npos) return stat;
    std::istringstream fields(text.substr(name_end + 1));
    fields >> stat.state;
    std::string skipped;
    for (int field = 4; field < 22; ++field) fields >> skipped;
    fields >> stat.start;
  } catch (const Error&) {
    // Gone, or hidden from us: the caller asks the kernel in another way.
  }
  return stat;
}

}  // namespace

std::string_view name_of(ProcessState state) {
  constexpr std::string_view kNames[] = {"alive", "stopped by a signal", "dead"};
  return kNames[static_cast<int>(state)];
}

ProcessState process_state(int pid, std::uint64_t start) {
  // Before kill() could take it for a group of processes.
  if (pid <= 0 || (::kill(pid, 0) != 0 && errno == ESRCH)) return ProcessState::dead;
  const Stat stat = read_stat(pid);
  if (stat.state == 'Z' || stat.state == 'X' || stat.state == 'x') return ProcessState::dead;
  if (start != 0 && stat.start != 0 && start != stat.start) return ProcessState::dead;
  return stat.state == 'T' || stat.state == 't' ? ProcessState::stopped : ProcessState::running;
}

std::uint64_t process_start_time(int pid) { return read_stat(pid).start; }

}  // namespace lockstep
