// Running lockstep-worker for `train` and `predict`: where it is, what it is told, and what its end
// means. One thread.
#pragma once

#include <string>

#include "lockstep/cluster/agent.h"
#include "lockstep/job/job.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

struct WorkerJob {
  std::string command;  // what lockstep-worker does: "train", "predict"
  Job job;
  // What the job does not say: where it is to run, what becomes of workers that die, the callbacks
  // (on_event: all but errors), more variables than LOCKSTEP_JOB.
  AgentOptions agent = {};
};

// Returns when every worker has ended well; true: because the job was asked to stop. Throws what
// ended the job: ConfigError (a worker found the input wrong), Error (the run failed, a worker
// died: rank, pid, cause, last words), Interrupted.
bool run_worker_job(const WorkerJob& job);

}  // namespace lockstep
