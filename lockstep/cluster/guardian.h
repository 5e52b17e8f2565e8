// A tiny child of the agent that outlives it: told of every process group that the agent starts, it
// kills them all when the agent goes without a goodbye, as by SIGKILL. The workers themselves die
// with the agent through the kernel; what they started in their groups does not. One thread.
#pragma once

#include "lockstep/base/file.h"

namespace lockstep {

class Guardian {
 public:
  // Forks it. Called early: it keeps none of the caller's descriptors. Throws Error.
  Guardian();
  ~Guardian();  // the goodbye
  Guardian(const Guardian&) = delete;
  Guardian& operator=(const Guardian&) = delete;

  int pid() const { return pid_; }
  void watch(int group);
  void forget(int group);

 private:
  void tell(int number);

  UniqueFd socket_;
  int pid_ = -1;
};

}  // namespace lockstep
