// What is known about a run while it goes and at its end, and every text made of it. Filled by
// events (event.h); the texts are pure functions of it. One thread.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace lockstep {

struct EpochRecord {
  std::int64_t epoch = 0;
  double train_loss = 0;
  std::optional<double> test_loss = {}, test_accuracy = {};
  double seconds = 0;  // training alone
  double evaluation_seconds = 0;
  double samples_per_s = 0;
};

struct RunRecord {
  std::string title;
  int workers = 1;
  double start_clock = 0;

  std::int64_t epochs_planned = 0, steps_per_epoch = 0;
  std::uint64_t train_samples = 0, test_samples = 0, parameters = 0;
  std::int64_t resumed_step = 0;               // 0: the run began at the start
  std::vector<nlohmann::json> resumed_epochs;  // their events
  std::vector<EpochRecord> epochs;             // those included
  std::map<int, nlohmann::json> ranks;         // the "rank" events
  std::vector<nlohmann::json> recoveries;      // the "recovery" events
  nlohmann::json solution;
  std::string stopped_because;
  std::optional<double> first_step_clock;
  std::uint64_t samples = 0;  // trained on until the last event

  // Of the last "step" event.
  std::int64_t step = 0;  // since the start
  std::int64_t epoch = 0;
  double loss = 0;
  double clock = 0;
  std::uint64_t samples_at_clock = 0;
  bool step_clock_known = false;
  double samples_per_s = 0;  // smoothed over about a second

  // Takes in one event of a kind it knows; others are ignored. Throws nlohmann's exceptions when a
  // member is missing or of a wrong type.
  void take(const nlohmann::json& event);
  double training_seconds() const;

 private:
  void take_resumed(const nlohmann::json& progress);
};

// A number member that may be missing or null (a number that is not finite travels as null).
double number_in(const nlohmann::json& event, const char* member);

std::string describe_start(const RunRecord& run);  // title, samples, parameters: whole lines
std::string progress_line(const RunRecord& run, int columns);  // at most `columns` wide
std::string epoch_line(const RunRecord& run);                  // of the last epoch
std::string recovery_line(const RunRecord& run);               // of the last recovery
std::string closing_tables(const RunRecord& run, double total_s);
nlohmann::ordered_json report_of(const RunRecord& run, double total_s,
                                 const std::string& weights_sha256);

}  // namespace lockstep
