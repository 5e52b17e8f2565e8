// Running lockstep-worker for `train` and `predict`: where it is, what it is told, and what its end
// means. One thread.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "lockstep/cluster/environment.h"
#include "lockstep/job/job.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

struct WorkerJob {
  std::string command;  // what lockstep-worker does: "train", "predict"
  Job job;
  Environment environment;  // more than LOCKSTEP_JOB
  std::shared_ptr<Segment> segment;
  std::function<void(int rank, const nlohmann::json& event)> on_event;  // all but errors
  std::function<void(int rank, bool error, std::string_view line)> on_line;
  std::function<void()> on_tick;
};

// Returns when every worker has ended well. Throws what ended the job: ConfigError (a worker found
// the input wrong), Error (the run failed, a worker died: rank, pid, cause, last words),
// Interrupted.
void run_worker_job(const WorkerJob& job);

}  // namespace lockstep
