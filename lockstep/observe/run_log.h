// What a person and their tools see of a run, written by the agent: progress on the terminal,
// metrics.jsonl, events.jsonl, TensorBoard event files, report.json, the closing table. Fed with
// the workers' events (event.h). One thread.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

// The events that metrics.jsonl does not have, one a line, each with `time` (since 1970, seconds)
// and `from` (the rank; -1: the agent). Runs that were resumed go on in it.
inline constexpr const char* kHistoryFile = "events.jsonl";

struct RunLogOptions {
  std::filesystem::path output;       // a folder; must exist when the last worker is ready
  std::filesystem::path report_copy;  // --report FILE.json; "" = none
  bool quiet = false;                 // print nothing
  bool terminal = false;              // standard output is a terminal: a progress bar
  int columns = 80;
  int workers = 1;
  bool resume = false;     // the files of the run in `output` go on from where it was interrupted
  double start_clock = 0;  // CLOCK_MONOTONIC when the program started, seconds
  double start_time = 0;   // seconds since 1970 at that moment
  std::string title;       // "fashion-mnist: mlp 128-64, adam, 2 workers"
  std::function<double()> clock;                // CLOCK_MONOTONIC now, seconds
  std::function<void(std::string_view)> print;  // to standard output
};

class RunLog {
 public:
  explicit RunLog(RunLogOptions options);
  ~RunLog();
  // The files are made once every worker is ready. Throws Error when one cannot be written (full
  // disk); what was written whole stays whole.
  void on_event(int rank, const nlohmann::json& event);
  void print_line(std::string_view line);  // whole, above the progress bar; not in quiet mode
  void on_tick();                          // redraws the progress bar
  bool files_made() const;
  // Writes report.json (and its copy) and prints the closing table and the files. `files`: more
  // files to list, in the output folder.
  void finish(const std::string& weights_sha256, const std::vector<std::filesystem::path>& files);
  // After a failure: ends the progress line. Once the files are made, report.json says why and what
  // was reached.
  void fail(const std::string& reason, const std::string& weights_sha256);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lockstep
