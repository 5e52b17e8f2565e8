// A worker's view of the job: its place, its group, the way to its agent. Groups come from here and
// from nowhere else. A World is a handle: copies share one state. Calls on the group: one thread at
// a time.
//
// Where the agent replaces workers, a worker is a member of one generation after another, and its
// rank, the world's size and the group are the generation's: what has to do with them is made anew
// after next_generation().
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/cluster/environment.h"
#include "lockstep/collective/group.h"

namespace lockstep {

class EventSink;
class Segment;

class World {
 public:
  int rank() const;
  int size() const;
  int local_rank() const;
  int local_size() const;
  std::uint64_t generation() const;
  const Place& place() const;
  Group& group() const;
  // Where the world spans nodes. Ranks of a node are contiguous.
  int node() const;                             // this rank's, in the order of their ranks
  const std::vector<int>& local_sizes() const;  // ranks of each node
  Group& local_group() const;                   // this node's ranks; of one node: group()
  // The ranks with this local rank, by node: they carry one part of the data between nodes. Null on
  // a rank whose number some node has not, and where there is one node.
  Group* across_group() const;
  EventSink& events() const;                 // to the agent; goes nowhere without one
  std::shared_ptr<Segment> segment() const;  // the node's shared memory
  int seat() const;                          // this worker's place there
  bool has_agent() const;

  // --- Generations ---
  // Tells the agent that this program can go on in another generation (Trainer and elastic::run do
  // it): who dies is replaced then, instead of ending all.
  void declare_elastic() const;
  // Whether it has been told, and there is an agent that makes generations.
  bool is_elastic() const;
  // Where init() left that out: becomes a member, and waits for it as long as it takes. A worker
  // joins when it is ready to work, because the others wait for it from then on.
  void join() const;
  // Leaves the group, and enters the newest generation; waits for one, the group's timeout at most,
  // and again where entering fails. `failure`: the CommError's words, "": none. False: this worker
  // is not a member any more. Throws CommError: no other generation came, the job has ended.
  bool next_generation(std::string_view failure = "") const;
  // Calls work() in one generation after another until it returns true, for a planned one too: in
  // the next when it returned false or, where the job is elastic, threw CommError. leave(): before
  // this worker leaves a generation for another. False: it is not a member any more.
  bool in_generations(
      const std::function<bool()>& work, const std::function<void()>& leave = [] {}) const;
  bool next_generation_is_due() const;
  bool stop_requested() const;  // the step under way is to be the last
  // Members, at least and at most; size() for both where members don't change.
  int least_size() const;
  int most_size() const;
  // Tells whoever looks for workers that hang that this one gets on.
  void made_progress() const;
  // This worker's memory in its arena under a name: zeroed when it is first asked for, and the same
  // from then on, in every generation. Throws Error when memory is short.
  std::span<std::byte> lasting(const std::string& name, std::size_t bytes) const;
  void release(const std::string& name) const;  // nobody may use it any more
  // The next number for keep() in memory/generation_board.h.
  int claim_kept() const;

 private:
  friend World init_from(const Place& place, const struct InitOptions& options);
  struct State;
  std::shared_ptr<State> state_;
};

// Gives this rank's text and gets everyone's, by rank. Throws CommError: who did not come.
using Exchange =
    std::function<std::vector<std::string>(const Place& place, const std::string& mine)>;
// How ranks on several nodes find each other that this launcher started. To be called before
// init(); returns true.
bool meet_by(Launcher launcher, Exchange exchange);

struct InitOptions {
  Clock::duration timeout = kDefaultTimeout;  // of joining and of every collective
  bool join = true;        // false: World::join() follows, where the agent makes generations
  bool exact = true;       // across nodes: only what adds in canonical order
  Exchange exchange = {};  // across nodes without an agent, called once; none: the launcher's
};

// Joins the job this process was started for: by `lockstep run`, torchrun, mpirun or srun; alone: a
// world of one. Without an agent, local rank 0 makes the segment and passes it over an abstract
// Unix socket that checks the peer's user. Throws ConfigError (environment) or CommError (who did
// not come).
World init(const InitOptions& options = {});
World init_from(const Place& place, const InitOptions& options);

}  // namespace lockstep
