// Who takes part in a job: a decision, as a pure state machine. Agents send reports of their whole
// node, the coordinator answers each with a whole assignment; so messages may be lost, delayed,
// doubled and reordered, and a coordinator that is started anew learns everything from the reports.
// docs/membership.md has the rules.
//
// Who owns what: values; a Coordinator keeps the newest report of each node. Threads: one at a
// time. No clock, no I/O: time is an argument, and what happens is up to who asks.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lockstep/base/deadline.h"

namespace lockstep {

// --- What an agent reports ---

enum class WorkerState : std::uint8_t {
  starting,  // loads data and model
  ready,     // waits to be a member, or is one
  dying,     // lost, as one that hangs, but its end has not been seen: not fenced
  finished,  // exited with 0
  failed,    // ended in any other way
};
inline bool lives(WorkerState state) { return state <= WorkerState::ready; }
inline bool ended(WorkerState state) { return state >= WorkerState::finished; }

struct WorkerReport {
  int seat = 0;
  std::uint64_t incarnation = 0;  // the how-manyeth worker of this node, from 0: never comes again
  int pid = 0;
  WorkerState state = WorkerState::starting;
  std::string cause = {};        // dying, failed: in words, "killed by signal 9 (SIGKILL)"
  bool failed_for_good = false;  // bad input, or its own error: to start it again is pointless
  // The newest generation whose group failed under it though nobody is known to have died
  // (comm_error), and its message.
  std::optional<std::uint64_t> comm_error = {};
  std::string message = {};
  std::optional<std::uint64_t> listed = {};  // the newest generation that it is a member of
  std::string address = {};                  // for members of other nodes; of no meaning here
};

struct Member {
  int node = 0;
  int seat = 0;
  std::uint64_t incarnation = 0;
  int pid = 0;
  std::string address = {};
  bool operator==(const Member& other) const {
    return node == other.node && incarnation == other.incarnation;
  }
};

// One agreed list of members: rank r is members[r]. Sorted by node.
struct JobGeneration {
  std::uint64_t number = 0;
  std::vector<Member> members;
  // Planned: members of the generation before that this one drops. They work until it is taken up.
  std::vector<Member> leaving;
  std::uint64_t over = 0;  // generations below this number are over when this one is published
  std::string reason;

  bool at_once() const { return over == number; }  // else it is taken up at the end of a step
};
using GenerationPtr = std::shared_ptr<const JobGeneration>;  // it has up to 10,000 members

struct NodeReport {
  int node = 0;               // an agent's life: never used again
  int rank = -1;              // the node's number for people; -1: `node`
  std::string host = {};      // its name for people
  std::uint64_t version = 0;  // grows
  int room = 0;               // how many workers more it could start now
  std::uint64_t started = 0;  // how many it has started ever: the next incarnation
  std::vector<WorkerReport> workers;
  GenerationPtr generation;                    // the newest that is published there; null: none
  std::uint64_t committed = 0;                 // the newest committed step
  std::optional<std::uint64_t> taken_up = {};  // the newest generation that committed a step
};

// --- What a coordinator answers ---

struct JobEnd {
  bool ok = false;  // all members finished
  std::string reason;
};

struct Assignment {
  std::uint64_t term = 0;          // of the coordinator
  std::uint64_t acknowledged = 0;  // the version of the newest report that it knows
  GenerationPtr generation;        // to be published; null: none yet
  std::uint64_t over = 0;          // generations below this number are over now
  std::uint64_t start = 0;  // start workers until NodeReport::started is this (less: nothing to do)
  std::vector<std::uint64_t> kill;             // incarnations that nobody needs
  std::optional<std::uint64_t> taken_up = {};  // the newest generation that committed a step
  std::optional<JobEnd> end;
};

// What has changed, for who shows it.
struct Decision {
  std::vector<std::string> reasons;  // one line each, in order
  GenerationPtr published;           // null: none
  std::optional<JobEnd> end;
  struct Loss {
    int rank;
    std::string cause;
  };
  std::vector<Loss> lost;  // members
  struct LostNode {
    int node;
    std::string cause;
  };
  std::vector<LostNode> lost_nodes;
  std::optional<Clock::time_point> again;  // decide again at this time, though nothing happened
};

struct Policy {
  int least = 1;  // below this number of members the job waits
  int most = 1;   // what it aims at unless scaled
  int standby = 0;
  int max_restarts = 10;
  Clock::duration restart_window = std::chrono::seconds(60);
  // How long a comm_error without a death waits for one.
  Clock::duration comm_error_patience = std::chrono::seconds(1);
  // How long workers that are ready wait for others that start, before they join.
  Clock::duration join_patience = std::chrono::milliseconds(500);
  // The same where nothing goes on meanwhile: at the beginning, and below `least`.
  Clock::duration start_patience = std::chrono::seconds(60);
  // Below `least` with nobody coming for so long: the job ends.
  Clock::duration wait_patience = std::chrono::seconds(60);
  // A node is lost, and its workers are fenced, when nothing has come from it for so long: they end
  // themselves before (Roster::lease). max(): never.
  Clock::duration node_timeout = Clock::duration::max();
};

class Coordinator {
 public:
  // term: greater for each coordinator of a job. One after the first (0) listens for node_timeout
  // before it decides anything. Throws ConfigError for numbers out of range.
  explicit Coordinator(const Policy& policy, Clock::time_point now, std::uint64_t term = 0);
  ~Coordinator();

  void take(const NodeReport& report, Clock::time_point now);  // old ones are ignored
  void scale(int workers);  // throws ConfigError if outside least..most
  // The connection of a node's agent has ended: it is lost unless it comes back at once.
  void disconnected(int node, Clock::time_point now);
  void end(bool ok, const std::string& reason);  // for reasons that are the agents'
  // After reports, scale(), or when Decision::again says so.
  Decision decide(Clock::time_point now);
  Assignment assignment(int node) const;

  int aimed() const;                 // how many members it aims at
  GenerationPtr generation() const;  // the newest; null: none

 private:
  class Machine;
  std::unique_ptr<Machine> machine_;
};

}  // namespace lockstep
