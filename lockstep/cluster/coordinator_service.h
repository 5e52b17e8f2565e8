// The coordinator of a job at work, in the agent of node 0: gathers the nodes, takes their reports
// over the control channel and this node's directly, has the Coordinator decide, and answers; what
// has changed is pushed. Also keeps the account of recoveries, and tells of generations.
//
// Who owns what: the control server is the agent's. Threads: one. Time is an argument.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "lockstep/cluster/control.h"
#include "lockstep/cluster/job_commands.h"
#include "lockstep/cluster/job_nodes.h"
#include "lockstep/cluster/membership.h"
#include "lockstep/cluster/recoveries.h"

namespace lockstep {

struct CoordinatorOptions {
  Policy policy;                    // least, most: of one node; those of the others are added
  int least_nodes = 1;              // fewer do not begin
  int nodes = 1;                    // at most
  NodeIntroduction self;            // node 0's
  NodeWelcome welcome;              // what is the same for all: restarts, master_…, run_id
  ControlServer* server = nullptr;  // null: nobody can come
};

class CoordinatorService {
 public:
  using Emit = std::function<void(const nlohmann::json& event)>;
  // "generation", "recovery" and "message" (event.h) go to `emit`.
  CoordinatorService(const CoordinatorOptions& options, Emit emit, Clock::time_point now);

  // This node's, once, when enough have come. Throws Error when they do not.
  std::optional<NodeWelcome> gather(Clock::time_point now);

  void take(const NodeReport& report, Clock::time_point now);  // this node's
  // What a worker said, on whichever node.
  void says(int rank, const nlohmann::json& event, Clock::time_point now);
  // This node's workers have all ended well; they are no members.
  void finished() { finished_ = changed_ = true; }
  bool due(Clock::time_point now) const { return changed_ || again_.expired(now); }
  Deadline again() const { return again_; }
  // This node's assignment. The others' are sent.
  Assignment decide(Clock::time_point now);

  // What another node asks: "join" and "report". Throws ConfigError. Its workers' events: events().
  static bool is_for_me(const ControlRequest& request);
  nlohmann::json answer(const ControlRequest& request, const ControlPeer& peer,
                        Clock::time_point now);
  void disconnected(int connection, Clock::time_point now);
  struct NodeEvent {
    int rank = -1;
    nlohmann::json event;
  };
  std::vector<NodeEvent> events() { return std::exchange(events_, {}); }
  // A node is lost since the last call: which, in words.
  std::vector<std::string> lost_nodes() { return std::exchange(lost_nodes_, {}); }

  void scale(int workers);  // throws ConfigError
  void stop();              // the step under way is to be the last: told to all
  bool stop_asked() const { return stop_; }
  // A fault has struck a worker of this node, of whichever by its life; those that struck
  // elsewhere.
  void struck(const nlohmann::json& injected, int life = 0);
  std::vector<std::string> struck_elsewhere(int life = 0) const;
  void end(bool ok, const std::string& reason);
  // The job has ended, and all nodes know it, or are lost.
  bool all_know() const;
  void set_elastic() { elastic_ = true; }  // who comes late may take part
  void finish() { recoveries_.tell(Clock::time_point::max()); }
  void tell_recoveries(Clock::time_point now) { recoveries_.tell(now); }

  const GenerationPtr generation() const {
    return coordinator_ ? coordinator_->generation() : nullptr;
  }
  JobStatus status() const;

 private:
  struct Node {
    NodeIntroduction introduction;
    Clock::time_point seen;
    int life = -1;  // -1: it only asked to join
    int lives = 0;
    NodeWelcome welcome;
    ControlPeer peer;
    std::string closed_route;  // of the connection that ended last, and when
    Clock::time_point closed_at;
    std::uint64_t request = 0;    // the newest
    std::uint64_t published = 0;  // number + 1 of the newest generation there
    std::uint64_t events = 0;     // so many have been taken
    nlohmann::json sent;          // the newest assignment
    bool finished = false, left = false, lost = false;
  };

  nlohmann::json join(const NodeIntroduction& node, const ControlPeer& peer, Clock::time_point now);
  nlohmann::json report(const ControlRequest& request, const ControlPeer& peer,
                        Clock::time_point now);
  void begin(Clock::time_point now);
  void admit(Node& node, Clock::time_point now);
  nlohmann::json assignment_for(const Node& node) const;
  nlohmann::json answer_for(Node& node);
  void push();
  Clock::time_point steady(Clock::time_point now) const { return now - stalled_; }

  CoordinatorOptions options_;
  Emit emit_;
  Recoveries recoveries_;
  std::optional<Coordinator> coordinator_;
  std::map<int, Node> nodes_;  // by rank, but this one
  std::optional<NodeWelcome> welcome_;
  Clock::time_point began_, newest_join_;
  std::size_t told_ = 0;  // of how many nodes was said that they are there
  int first_rank_ = 0;    // of the next node
  bool stop_ = false, elastic_ = false, changed_ = true, finished_ = false, ended_ = false;
  std::vector<NodeEvent> events_;
  std::vector<std::string> lost_nodes_;
  std::vector<std::pair<int, std::string>> struck_;  // a life, and the fault
  Deadline again_ = Deadline::never();
  Clock::time_point looked_;
  Clock::duration stalled_{};  // how long this process has stood still
};

}  // namespace lockstep
