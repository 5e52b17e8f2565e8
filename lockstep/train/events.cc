#include "lockstep/train/events.h"

#include <sys/resource.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace lockstep {

double monotonic_clock() { return seconds(Clock::now().time_since_epoch()); }

nlohmann::json ready_event(const World& world, std::uint64_t train_samples,
                           std::uint64_t test_samples, std::uint64_t parameters,
                           std::uint64_t steps_per_epoch, std::int64_t epochs) {
  return {{"event", "ready"},
          {"rank", world.rank()},
          {"train_samples", train_samples},
          {"test_samples", test_samples},
          {"parameters", parameters},
          {"steps_per_epoch", steps_per_epoch},
          {"epochs", epochs}};
}

nlohmann::json first_step_event() {
  return {{"event", "first_step"}, {"rank", 0}, {"clock", monotonic_clock()}};
}

nlohmann::json epoch_event(const EpochSummary& summary) {
  nlohmann::json event = {{"event", "epoch"},
                          {"epoch", summary.epoch},
                          {"step", summary.step},
                          {"train_loss", summary.train_loss},
                          {"grad_norm", summary.gradient_norm},
                          {"lr", summary.lr},
                          {"samples", summary.samples},
                          {"seconds", summary.seconds},
                          {"eval_seconds", summary.evaluation_seconds}};
  if (summary.evaluated) event["test_loss"] = summary.test_loss;
  if (summary.evaluated && summary.has_accuracy) event["test_accuracy"] = summary.test_accuracy;
  return event;
}

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto as_seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return as_seconds(usage.ru_utime) + as_seconds(usage.ru_stime);
}

nlohmann::json rank_event(const World& world, const PhaseTimer& timer) {
  const double total_s = timer.total_seconds();
  nlohmann::json spent;
  double known = 0;
  for (std::size_t i = 0; i < kPhaseNames.size(); ++i) {
    const double in_phase = timer.seconds_in(static_cast<Phase>(i));
    spent[std::string(kPhaseNames[i])] = in_phase;
    known += in_phase;
  }
  spent["other"] = std::max(0.0, total_s - known);
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  nlohmann::json event = {{"event", "rank"},
                          {"rank", world.rank()},
                          {"seconds", std::move(spent)},
                          {"total_s", total_s},
                          {"cpu_s", timer.total_cpu_seconds()},
                          {"peak_memory_bytes", std::int64_t{1024} * usage.ru_maxrss}};
  if (const auto& [busy, exposed] = timer.queued(); busy > Clock::duration::zero())
    event["queued"] = {{"hidden", seconds(std::max(busy - exposed, Clock::duration::zero()))},
                       {"exposed", seconds(exposed)}};
  return event;
}

nlohmann::json finished_event(const std::string& reason, std::int64_t epochs, std::int64_t steps) {
  return {{"event", "finished"}, {"reason", reason}, {"epochs", epochs}, {"steps", steps}};
}

}  // namespace lockstep
