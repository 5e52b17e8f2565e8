// The zygote: a process that has loaded what every worker needs (libraries, the data set), has
// started no thread, and forks workers on request: such a worker works after milliseconds and
// shares what was loaded. The agent execs it once; requests and answers are messages over a socket.
// A worker is forked twice, so that the agent, a subreaper, becomes its parent: it reads the
// worker's exit status itself. Everything received is checked. One thread on either side.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "lockstep/base/file.h"
#include "lockstep/cluster/environment.h"
#include "lockstep/cluster/spawn.h"

namespace lockstep {

// The agent's side: its socket. Closing it ends the zygote, but no worker.
class Zygote {
 public:
  // Starts `command`, whose `environment` gets LOCKSTEP_ZYGOTE_FD too. What it loads, it loads
  // while the requests wait. Throws Error.
  Process start(const std::vector<std::string>& command, Environment environment,
                const Streams& its_streams);

  int socket() const { return socket_.get(); }  // readable: an answer, or it has ended
  // Asks for a worker with these variables over the zygote's own. Returns 0 or the errno: it has
  // ended, or has left too many requests waiting.
  int request(const Environment& environment, const Streams& streams, int segment_fd);
  // The next answer, in the requests' order: the new worker's pid, or a negative errno. Nothing if
  // none is there.
  std::optional<int> answer();
  bool ended() const { return ended_; }  // and its last answer has been taken

 private:
  UniqueFd socket_;
  bool ended_ = false;
};

// The zygote's side: answers requests over the socket LOCKSTEP_ZYGOTE_FD. Returns in every worker,
// which then has its variables, streams and signals as after exec; never in the zygote itself,
// which ends with the agent. The process must have one thread.
void serve_as_zygote(int socket);

}  // namespace lockstep
