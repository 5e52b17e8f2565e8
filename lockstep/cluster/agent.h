// The agent: starts the workers of this node, watches them through the kernel (pidfd), carries
// their output and events, replaces those that die or hang or ends all of them, and leaves nothing
// behind. Links no torch. One a process, single thread: run_agent() blocks until every worker is
// gone; callbacks come from inside it.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/cluster/control.h"
#include "lockstep/cluster/environment.h"
#include "lockstep/cluster/faults.h"

namespace lockstep {

class Console;
class Segment;

// Where the job has several nodes.
struct NodesOptions {
  int rank = 0;             // this one's
  int least = 1, most = 1;  // nodes
  // A node that is silent for so long is lost; it has ended its workers by then.
  Clock::duration timeout = std::chrono::milliseconds(1500);
  // What must be the same on all, under the name that messages give it.
  std::map<std::string, std::string> same = {};
  int bound_to = -1;  // a descriptor whose end means what SIGTERM means; -1: none
  std::optional<ControlTarget> coordinator = {};  // for all but node 0, whose `control` it is
};

struct AgentOptions {
  int workers = 1;  // at most, and aimed at; on this node
  // Program and arguments, the same for every worker; found through PATH.
  std::vector<std::string> command;
  bool zygote = false;         // `command` is one (zygote.h), which forks the workers
  Environment environment;     // set over the agent's own
  std::optional<int> threads;  // OMP_NUM_THREADS; none: 1 when unset and workers > 1
  std::string master_addr = "127.0.0.1";
  int master_port = 29500;           // only told to the workers, never bound
  std::shared_ptr<Segment> segment;  // made by the caller, for `workers` ranks; null: lockstep's
                                     // own variables are not set, workers are any programs
  Clock::duration grace = std::chrono::seconds(5);  // from SIGTERM to SIGKILL when ending

  // --- Where workers can go on in another generation (World::declare_elastic) ---
  bool elastic = false;  // known beforehand: who dies before it has said so is replaced, too
  int least = 0;         // members that the job can go on with; 0: `workers`
  int standby = 0;       // workers more that are ready and wait
  int max_restarts = 0;  // of workers within the window
  Clock::duration restart_window = std::chrono::seconds(60);
  Clock::duration hang_timeout{};   // zero: who hangs is not looked for
  Clock::duration start_timeout{};  // of a worker, to join; zero: as long as it takes
  Clock::duration stop_grace = std::chrono::seconds(30);  // from a stop to the workers' end
  // Where they can't: a death ends all, and all are started again, max_restarts times in all.
  bool restart_all = false;

  std::optional<NodesOptions> nodes = {};  // needs a segment
  ControlServer* control = nullptr;  // of lockstep scale, status, stop; the caller's, may be null

  // rank -1: the agent's own (event.h).
  std::vector<TimedKills> kills = {};  // of members, to see the job survive them

  std::function<void(int rank, const nlohmann::json& event)> on_event;
  // A line of a worker's output, without its end. error: it came from standard error.
  std::function<void(int rank, bool error, std::string_view line)> on_line;
  std::function<void()> on_tick;  // about ten times a second
  // What the callbacks write to. The agent passes it on, and leaves the workers' pipes unread while
  // it is full. The caller's; may be null.
  Console* console = nullptr;
};

struct WorkerFailure {
  int rank = -1;  // -1: no single worker's
  int pid = 0;
  std::string cause;                         // "killed by signal 9 (SIGKILL)", "exited with code 3"
  std::vector<std::string> last_words = {};  // the last lines of its standard error
  std::string place = {};                    // " on node 1"
  std::string note = {};  // why the job did not go on without it, if that was tried
};

struct AgentResult {
  bool ok = false;                       // every worker exited with 0
  std::optional<WorkerFailure> failure;  // the first that failed
  int signal = 0;                        // the signal that ended the job from outside, or 0
  bool stopped = false;                  // it was asked to stop
  std::shared_ptr<Segment> segment;      // another than the options', where all were started again
};

// on_event, on_line and on_tick may throw: the workers are ended, then the exception leaves
// run_agent(). Throws ConfigError when the program cannot be started. Takes over SIGINT, SIGTERM,
// SIGHUP and SIGQUIT while it runs: the first asks the workers to end (SIGTERM: where they are
// elastic, to stop after the step), a second ends them at once.
// Every child that this process gets meanwhile is ended with the workers.
AgentResult run_agent(const AgentOptions& options);

// "rank 1 (pid 4711): killed by signal 9 (SIGKILL)" followed by the last words, each on a line of
// its own.
std::string describe(const WorkerFailure& failure);

}  // namespace lockstep
