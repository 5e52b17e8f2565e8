// A worker's view of the job: its place, its group, the way to its agent. Groups come from here and
// from nowhere else. A World is a handle: copies share one state. Calls on the group: one thread at
// a time.
#pragma once

#include <memory>
#include <string>

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
  EventSink& events() const;  // to the agent; goes nowhere without one
  std::shared_ptr<Segment> segment() const;  // the node's shared memory; null alone
  bool has_agent() const;

 private:
  friend World init_from(const Place& place, const struct InitOptions& options);
  struct State;
  std::shared_ptr<State> state_;
};

struct InitOptions {
  Clock::duration timeout = kDefaultTimeout;  // of joining and of every collective
};

// Joins the job this process was started for: by `lockstep run`, torchrun, mpirun or srun; alone: a
// world of one. Without an agent, local rank 0 makes the segment and passes it over an abstract
// Unix socket that checks the peer's user. Throws ConfigError (environment, a world of several
// nodes: not in this version) or CommError (who did not come).
World init(const InitOptions& options = {});
World init_from(const Place& place, const InitOptions& options);

}  // namespace lockstep
