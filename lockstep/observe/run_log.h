// What a person and their tools see of a run, written by the agent: progress on the terminal,
// metrics.jsonl, TensorBoard event files, report.json, the closing table. Fed with the workers'
// events (event.h). One thread.
#pragma once

#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace lockstep {

struct RunLogOptions {
  std::filesystem::path output;       // an existing folder
  std::filesystem::path report_copy;  // --report FILE.json; "" = none
  bool quiet = false;                 // print nothing
  bool terminal = false;              // standard output is a terminal: a progress bar
  int columns = 80;
  int workers = 1;
  double start_clock = 0;  // CLOCK_MONOTONIC when the program started, seconds
  double start_time = 0;   // seconds since 1970
  std::string title;       // "fashion-mnist: mlp 784-128-64-10, adam, 2 workers x 64"
};

class RunLog {
 public:
  explicit RunLog(RunLogOptions options);
  ~RunLog();
  // Throws Error when a file cannot be written (full disk); what was written whole stays whole.
  void on_event(int rank, const nlohmann::json& event);
  void on_line(int rank, bool error,
               std::string_view line);  // a worker's own output, shown with its rank
  void on_tick();                       // redraws the progress bar
  // Writes report.json (and its copy) and prints the closing table and the files. `files`: more
  // files to list.
  void finish(const std::string& weights_sha256, const std::vector<std::filesystem::path>& files);
  // After a failure: ends the progress line and closes the files, keeping whole lines only.
  void abandon();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lockstep
