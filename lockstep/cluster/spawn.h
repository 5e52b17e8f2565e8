// Starting one worker process, and what the kernel tells about the processes that the agent
// started. Used by the agent's one thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lockstep/base/file.h"
#include "lockstep/cluster/environment.h"

namespace lockstep {

// A worker's standard output, standard error and events: one end of each pipe.
struct Streams {
  UniqueFd output, error, events;
};
struct StreamEnds {
  Streams read;  // the agent's: non-blocking
  Streams write;
};
StreamEnds make_streams();

struct Process {
  int pid = 0;           // 0: not started yet
  UniqueFd pidfd;        // readable once it has ended
  UniqueFd exec_status;  // an errno if the program could not be started, else end of file
};

// Starts `command` (found through PATH) in a process group of its own, with standard input from
// /dev/null; it dies with this process. `environment` is complete but for LOCKSTEP_EVENT_FD.
// inherited_fd: one more descriptor that it has; -1: none. Throws Error when the system refuses.
Process spawn(const std::vector<std::string>& command, Environment environment,
              const Streams& streams, int inherited_fd);
// Waits until the program runs; 0 or the errno of execve.
int wait_for_exec(const Process& process);
// A child of this process that somebody else started for it.
Process adopt(int pid);

// Children of this process, ended ones too. Empty without a system call more when there are none.
std::vector<int> child_processes();
// Ends and reaps every child that is not in `spared`, and their children as they become ours.
// False if one did not go within the deadline.
bool kill_children_except(const std::vector<int>& spared);

// "SIGKILL"; "signal 40" for one without a name.
std::string signal_name(int signal);
// How many processes of this control group the kernel has killed for memory; 0 if it doesn't tell.
std::uint64_t out_of_memory_kills();

}  // namespace lockstep
