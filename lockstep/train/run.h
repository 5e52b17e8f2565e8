// fit() in one generation. Private to this layer; one thread. Files: trainer.cc (fit(), from one
// generation to the next), run.cc (the loop of steps and epochs).
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "lockstep/cluster/faults.h"
#include "lockstep/data/ledger.h"
#include "lockstep/train/phases.h"
#include "lockstep/train/snapshot.h"
#include "lockstep/train/step.h"
#include "lockstep/train/trainer.h"
#include "lockstep/train/training_checkpoints.h"

namespace lockstep {

inline constexpr Clock::duration kTimesInterval = std::chrono::seconds(1);

// What one rank's fit() keeps from one generation to the next.
struct Session {
  explicit Session(const World& world) : timer(world), faults(world), kept(world.claim_kept()) {}
  PhaseTimer timer;
  FaultInjector faults;
  const int kept;  // of the shared weights
  std::optional<CheckpointWriter> checkpoints;
  bool in_step = false;  // computing one that is not committed
  bool first_step = true;
  bool stopped = false;  // by a callback, here or on another rank
  std::int64_t epochs_called_back = 0;
};

// What a checkpoint is compared by.
JobSettings settings_of(const TrainerOptions& options, const OptimizerOptions& optimizer,
                        const Schedule& schedule, const BatchSource& train,
                        const BatchSource* test);

// The state that the parts of fit() share in a generation.
class Run {
 public:
  Run(const World& world, const TrainerOptions& options, const Task& task,
      const OptimizerOptions& optimizer, const Schedule& schedule, const BatchSource& train,
      const BatchSource* test, const FoundCheckpoint& found, Session& session);
  // Nothing: the next generation is due.
  std::optional<FitReport> go();

 private:
  // Both say why training ends, "": it goes on. After run_steps() an epoch may be incomplete.
  std::string run_steps();
  std::string end_epoch();
  void run_step(const Ledger::Epoch& order, bool last);
  void evaluate_into(EpochSummary& summary);
  bool any_rank_stops(bool goes_on);
  void save_epoch(const std::string& reason);
  void write_snapshot();
  nlohmann::json ready() const;
  void take_up();
  void tell_recovered();
  void report_step(const StepOutcome& result);
  void report_epoch();

  const World& world_;
  const Task& task_;
  const Schedule& schedule_;
  const BatchSource& train_;
  const BatchSource* test_;
  const FoundCheckpoint& found_;
  Session& session_;
  SharedWeights weights_;
  const TrainerOptions options_;  // with the number of virtual ranks that these weights have
  Ledger ledger_;
  StepExecutor executor_;
  Snapshots snapshots_;
  Progress progress_;
  bool next_generation_ = false;  // is due
  bool preempted_ = false;
  nlohmann::json recovered_;  // to be told once a step is committed, or none is left
  double lr_ = 0;             // of the last step
  double loss_ = 0;           // of the last step, its mean
  Clock::time_point next_progress_{}, next_times_ = Clock::now() + kTimesInterval;
};

}  // namespace lockstep
