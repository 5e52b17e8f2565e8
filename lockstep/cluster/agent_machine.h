// The agent from inside. Internal to cluster/agent*.cc; who owns what and threads: agent.h.
#pragma once

#include <fmt/format.h>

#include <cerrno>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/cluster/agent.h"
#include "lockstep/cluster/coordinator_link.h"
#include "lockstep/cluster/coordinator_service.h"
#include "lockstep/cluster/guardian.h"
#include "lockstep/cluster/job_commands.h"
#include "lockstep/cluster/members.h"
#include "lockstep/cluster/worker_process.h"
#include "lockstep/cluster/zygote.h"

namespace lockstep {

class Agent : public ControlHandler {
 public:
  explicit Agent(const AgentOptions& options) : options_(options), segment_(options.segment) {}
  AgentResult run();

  JobStatus status() override;
  void scale(int workers) override;
  void stop() override;

 private:
  static constexpr int kZygoteId = 0;  // among the workers' ids

  enum class Source : std::uint32_t {
    output,
    error,
    events,
    exit,
    signal,
    timer,
    zygote,
    control,
    link,
    bound
  };
  struct Worker {
    WorkerProcess process;
    int rank = 0;              // expected, or as a member; -1: none
    std::uint64_t number = 0;  // among the members
    bool running = false;
  };
  // A worker that a zygote is to fork.
  struct Request {
    int id = 0;
    Environment environment;
    Streams streams;  // its ends
    bool asked = false;
  };
  struct Death {
    WorkerFailure failure;
    int suspicion = 0;  // see Ending
    bool for_good = false;
  };

  // agent_processes.cc: starting, reading, reaping.
  Environment common_environment() const;
  Environment place_environment(int seat, int rank) const;
  void start_zygote();
  int start_worker(int seat, int rank);
  Worker& add_worker(int id, int rank, Streams streams);
  void runs(int id, Process process);
  void check_exec(const WorkerProcess& process) const;
  void ask_zygote();
  void take_answers();
  void zygote_ended(const Ending& ending);
  void drop_requests();
  void watch(int fd, Source source, int id);
  void take_exit(int id);
  void take_event(Worker& worker, const nlohmann::json& event);
  WorkerProcess::OnLine on_line(const Worker& worker);
  WorkerProcess::OnEvent on_event(Worker& worker);
  void kill_group(const Worker& worker, int number);
  void signal_workers(int number);

  // agent.cc: the loop and what ends a job.
  void start();
  void start_timer();
  void begin_job();
  void begin_life(const NodeWelcome& welcome);
  void loop();
  void wait();
  void take(Source source, int id);
  void take_tick();
  void strike();
  void take_signal();
  void take_death(const Worker& worker, const Ending& ending);
  const Death& likeliest() const;
  void settle();
  void step_members();
  void follow(const Assignment& assignment, Clock::time_point now);

  // agent_nodes.cc: where there are several.
  NodeIntroduction introduction() const;
  void make_link();
  void serve();
  void step_link();
  void take_from_node(int rank, const nlohmann::json& event);
  void tell_death(const Death& death, int rank, bool replaced);
  void tell_signal(int number, bool stops);
  void spare(const std::vector<std::string>& struck);
  void end_this_life(const std::string& reason);
  bool began() const { return members_ && members_->began(); }
  bool waits_for_nodes();
  bool goes_on() const { return !ending_ && !done_; }

  void condemn(const NodeMembers::Condemned& one);
  Deadline next_deadline() const;
  bool waits_for_replacements() const;
  void start_again();
  void end(const std::string& reason, bool at_once);
  void fail(const std::string& reason);
  void finish();
  void tell(const nlohmann::json& event);
  bool only_standbys() const;

  const AgentOptions& options_;
  std::shared_ptr<Segment> segment_;
  std::string trace_;  // LOCKSTEP_TRACE
  AgentResult result_;
  std::map<int, Worker> workers_;
  int last_id_ = kZygoteId;
  int running_ = 0;  // or to be forked; the zygote aside
  std::optional<Zygote> zygote_;
  std::deque<Request> requests_;        // oldest first
  int zygotes_lost_ = 0;                // since the last that started a worker
  std::vector<Death> deaths_;           // since the last recovery
  std::size_t settled_ = 0;             // of them
  std::optional<NodeMembers> members_;  // where there is a segment, and all nodes have come
  std::optional<CoordinatorService> coordinator_;  // on node 0
  std::optional<CoordinatorLink> link_;            // on the others
  NodeWelcome welcome_;
  Deadline leave_by_ = Deadline::never();  // without having heard that the others know
  std::map<std::uint64_t, int> ids_;       // of members' numbers
  bool elastic_ = false;                   // a worker has said that it is
  int restarts_ = 0;                       // of all workers, where they are not elastic
  bool restarting_ = false;
  bool unreplaced_ = false;  // somebody has died whom the coordinator is not asked about
  std::vector<KillTimer> kills_;
  std::size_t spared_ = 0;  // faults that struck on other nodes, and are marked as such here
  std::optional<Guardian> guardian_;
  std::vector<int> children_before_;
  UniqueFd epoll_;  // exits, signals, ticks
  UniqueFd pipes_;  // an epoll too: what the workers write, which can be left waiting
  UniqueFd signals_, timer_;
  bool started_ = false;
  bool ending_ = false;
  bool done_ = false;   // all members have finished: who is left is not needed
  bool muted_ = false;  // a callback has thrown: none is called any more
  Deadline kill_at_ = Deadline::never();
};

}  // namespace lockstep
