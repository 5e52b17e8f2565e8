// What the status page shows of a job, live and in a report: one JSON object, and what it is made
// of. Fed with the same events as RunLog: the workers' (event.h) and, with rank -1, the agent's
// (generation, worker, recovery). Pure: every time is an argument, in seconds since 1970. Its size
// is bounded however long the job. One thread.
//
// The object (docs/dashboard.md names its members for users; tools/page.html reads them):
//   title, folder, state, reason, health: {ok, reason}, time, started, ended?, workers_wanted,
//   workers_least, generation, deaths, recovery_count, generation_count, last_step_s,
//   progress: {step, steps, epoch, epochs, samples, train_samples, test_samples, parameters, loss,
//     lr, grad_norm, samples_per_s},
//   workers: [{rank, seat, node, pid, state, since, cause, died, last_death?: {cause, time}}],
//   generations: [{generation, time, workers, reason}],
//   recoveries: [{time, step, rank, cause, seconds, rejoined_seconds, steps_redone, source,
//   generation}], steps: {step: [], loss: [], samples_per_s: []}, epochs: [{epoch, train_loss, …}],
//   breakdown: [{rank, seconds: {data, …}, total_s, cpu_s, peak_memory_bytes}],
//   events: [{time, kind, text}]
// What is not known is null.
#pragma once

#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "lockstep/observe/run_record.h"
#include "lockstep/observe/thinned_series.h"

namespace lockstep {

struct StatusOptions {
  std::string title;
  std::string folder;           // where the run's files are
  int workers = 1;              // wanted
  int least = 1;                // fewer cannot go on
  double started = 0;           // 0: not known
  double hang_timeout_s = 300;  // without a committed step for longer, the job is not healthy
};

class Status {
 public:
  explicit Status(StatusOptions options);
  // Throws nlohmann's exceptions when a member is missing or of a wrong type. Beside those named
  // above, with rank -1: run: title, workers, started (in a file: another session of the job has
  // begun); end: failed (why, "" = it did not). From any rank: output: text (a line of it).
  void on_event(int rank, const nlohmann::json& event, double now);
  nlohmann::json json(double now) const;

 private:
  struct Worker {
    int rank = -1, seat = -1, node = 0;
    std::int64_t pid = 0;
    std::string state, cause = {};
    double since = 0;
  };
  struct Death {
    std::string cause;
    double time = 0;
  };
  void note(double now, const char* kind, std::string text);
  void set_state(Worker& worker, const std::string& state, double now);
  void take_worker(const nlohmann::json& event, double now);
  void take_generation(const nlohmann::json& event, double now);
  void take_run(const nlohmann::json& event, double now);
  void take_recovery(const nlohmann::json& event, double now);
  void take_end(const std::string& failure, double now);
  void take_from_agent(const nlohmann::json& event, double now);
  void take_from_worker(int rank, const nlohmann::json& event, double now);
  bool enough_workers() const;
  std::string state() const;
  std::string ill_because(double now) const;  // "" = healthy
  nlohmann::json workers_json() const;
  nlohmann::json progress_json() const;

  StatusOptions options_;
  RunRecord run_;
  double lr_, grad_norm_;
  ThinnedSeries<2> steps_;    // loss, samples_per_s
  double progressed_;         // the last committed step that is known of
  bool agent_tells_ = false;  // of workers and generations; else the workers' own words count
  bool recovering_ = false, ended_ = false;
  double ended_at_ = 0;
  std::string failure_;
  // By node and seat; by 0 and rank unless agent_tells_.
  std::map<std::pair<int, int>, Worker> workers_;
  std::map<int, Death> last_deaths_;  // by rank
  std::uint64_t deaths_ = 0, generation_count_ = 0, recovery_count_ = 0;
  std::deque<nlohmann::json> generations_, recoveries_, events_;  // the newest
  nlohmann::json generation_;
};

}  // namespace lockstep
