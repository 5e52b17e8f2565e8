// Running lockstep-worker for `train` and `predict`: where it is, what it is told, and what its end
// means. One thread.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lockstep/cluster/agent.h"
#include "lockstep/cluster/environment.h"
#include "lockstep/cluster/faults.h"
#include "lockstep/job/job.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

// Where workers that die or hang are replaced.
struct ElasticSettings {
  bool elastic = false;
  int standby = 0, max_restarts = 0;
  ControlServer* control = nullptr;
  double restart_window_s = 60;
};

struct WorkerJob {
  std::string command;  // what lockstep-worker does: "train", "predict"
  Job job;
  Environment environment;  // more than LOCKSTEP_JOB
  ElasticSettings elastic = {};
  std::optional<NodesOptions> nodes = {};
  std::string master_addr = "127.0.0.1";
  std::vector<TimedKills> kills = {};  // of members, to see the job survive them
  std::shared_ptr<Segment> segment;
  std::function<void(int rank, const nlohmann::json& event)> on_event;  // all but errors; the
                                                                        // agent's own have rank -1
  std::function<void(int rank, bool error, std::string_view line)> on_line;
  std::function<void()> on_tick;
};

// Returns when every worker has ended well; true: because the job was asked to stop. Throws what
// ended the job: ConfigError (a worker found the input wrong), Error (the run failed, a worker
// died: rank, pid, cause, last words), Interrupted.
bool run_worker_job(const WorkerJob& job);

}  // namespace lockstep
