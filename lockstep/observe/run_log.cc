#include "lockstep/observe/run_log.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/observe/append_file.h"
#include "lockstep/observe/run_record.h"
#include "lockstep/observe/tensorboard.h"
#include "lockstep/observe/words.h"

namespace lockstep {
namespace {

constexpr std::array kNotInHistory = {"step", "epoch", "snapshot", "rank"};
constexpr std::string_view kClearLine = "\r\x1b[K";

std::string host_name() {
  char name[256] = {};
  ::gethostname(name, sizeof name - 1);
  return name;
}

std::string as_line(const nlohmann::json& value) {
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

void write_report(const std::filesystem::path& path, const nlohmann::ordered_json& report) {
  const std::string text =
      report.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  with_free_space_note(path, [&] { write_file_atomically(path, text); });
}

// The lines of an interrupted run that its checkpoint has, too: steps up to it, and its epochs.
// What came later comes again.
std::string metrics_before(const std::filesystem::path& path, const RunRecord& run) {
  std::multimap<std::int64_t, std::string> lines;  // by step; of equal ones the step's come first
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto event = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!event.is_object() || event.value("event", "") != "step") continue;
    const std::int64_t step = event.value("step", std::int64_t{0});
    if (step <= run.resumed_step) lines.emplace(step, line + "\n");
  }
  for (const nlohmann::json& epoch : run.resumed_epochs)
    lines.emplace(epoch.at("step").get<std::int64_t>(), as_line(epoch));
  std::string text;
  for (const auto& [step, line] : lines) text += line;
  return text;
}

}  // namespace

struct RunLog::State {
  RunLogOptions options;
  RunRecord run;
  std::vector<nlohmann::json> early;  // messages before there are files
  bool bar_shown = false;
  std::optional<AppendFile> metrics, board, history;
  std::string early_history;  // until the files are made

  void print(const std::string& text) {
    if (!options.quiet) options.print(text);
  }
  void clear_bar() {
    if (std::exchange(bar_shown, false)) print(std::string(kClearLine));
  }
  void draw_bar() {
    if (!options.terminal || options.quiet) return;
    print(std::string(kClearLine) + progress_line(run, options.columns));
    bar_shown = true;
  }
  double wall_time() const { return options.start_time + options.clock() - options.start_clock; }
  double total_s() const { return options.clock() - options.start_clock; }

  void open_files() {
    const std::filesystem::path path = options.output / "metrics.jsonl";
    if (options.resume)
      with_free_space_note(path, [&] { write_file_atomically(path, metrics_before(path, run)); });
    metrics.emplace(path, std::filesystem::path(), options.resume);
    board.emplace(options.output /
                  tensorboard_file_name(options.start_time, host_name(), ::getpid()));
    board->append(as_byte_span(tensorboard_header(wall_time())));
    if (options.resume)
      board->append(as_byte_span(tensorboard_start(wall_time(), run.resumed_step + 1)));
    history.emplace(options.output / kHistoryFile, std::filesystem::path(), options.resume);
    // An agent that was killed may have left a line without an end.
    if (options.resume) early_history.insert(0, "\n");
    history->append(as_byte_span(std::exchange(early_history, "")));
    clear_bar();
    print(describe_start(run));
  }
  // What happened, for `lockstep report`; metrics.jsonl has the rest.
  void remember(int rank, nlohmann::json event) {
    event["time"] = wall_time();
    event["from"] = rank;
    if (history)
      history->append(as_byte_span(as_line(event)));
    else
      early_history += as_line(event);
  }
  void log_scalars(const nlohmann::json& event, bool epoch) {
    nlohmann::json stamped = event;
    stamped["time"] = wall_time();
    metrics->append(as_byte_span(as_line(stamped)));
    Scalars scalars;
    const auto add = [&](const char* tag, const char* member) {
      if (event.contains(member)) scalars.emplace_back(tag, number_in(event, member));
    };
    add("loss/train", epoch ? "train_loss" : "loss");
    add("loss/test", "test_loss");
    add("accuracy/test", "test_accuracy");
    add("lr", "lr");
    add("grad_norm", "grad_norm");
    const double rate = epoch ? run.epochs.back().samples_per_s : run.samples_per_s;
    if (rate > 0) scalars.emplace_back("samples_per_s", rate);  // not known at the first step
    board->append(as_byte_span(tensorboard_scalars(wall_time(), event.at("step"), scalars)));
  }
};

RunLog::RunLog(RunLogOptions options) : state_(std::make_unique<State>()) {
  state_->run.title = options.title;
  state_->run.workers = options.workers;
  state_->run.start_clock = options.start_clock;
  state_->options = std::move(options);
  state_->remember(-1, {{"event", "run"},
                        {"title", state_->run.title},
                        {"workers", state_->run.workers},
                        {"started", state_->options.start_time}});
  state_->draw_bar();
}

RunLog::~RunLog() = default;

bool RunLog::files_made() const { return state_->board.has_value(); }

void RunLog::on_event(int rank, const nlohmann::json& event) {
  State& state = *state_;
  const std::string& kind = event.at("event").get_ref<const std::string&>();
  if (kind == "message" && !files_made()) return state.early.push_back(event);
  if (std::find(kNotInHistory.begin(), kNotInHistory.end(), kind) == kNotInHistory.end())
    state.remember(rank, event);
  if (kind == "ready" && files_made()) {
    // Another generation: an epoch's end may not have been told by the one before.
    if (event.contains("resumed"))
      for (const nlohmann::json& epoch : event["resumed"].at("epochs")) on_event(rank, epoch);
    return;
  }
  if (kind == "epoch" && event.at("epoch") <= state.run.epochs.size()) return;  // done again
  state.run.take(event);
  if (kind == "ready") {
    state.open_files();
    for (const nlohmann::json& message : std::exchange(state.early, {})) on_event(rank, message);
  } else if (kind == "step" || kind == "epoch") {
    if (!files_made()) throw Error(kind + " reported before the workers were ready");
    state.log_scalars(event, kind == "epoch");
    if (kind == "epoch") print_line(epoch_line(state.run));
  } else if (kind == "recovery") {
    print_line(recovery_line(state.run));
  } else if (kind == "generation" && event.at("generation") > 0) {
    print_line(event.at("reason").get_ref<const std::string&>());
  } else if (kind == "message") {
    print_line(event.at("text").get_ref<const std::string&>());
  } else if (kind == "injected") {
    print_line(fmt::format("[rank {}] injected: {}", event.at("rank").get<int>(),
                           event.at("fault").get_ref<const std::string&>()));
  }
}

void RunLog::print_line(std::string_view line) {
  state_->clear_bar();
  state_->print(std::string(line) + "\n");
}

void RunLog::on_tick() { state_->draw_bar(); }

void RunLog::finish(const std::string& weights_sha256,
                    const std::vector<std::filesystem::path>& files) {
  State& state = *state_;
  const nlohmann::ordered_json report = report_of(state.run, state.total_s(), weights_sha256);
  const std::filesystem::path path = state.options.output / "report.json";
  write_report(path, report);
  if (!state.options.report_copy.empty()) write_report(state.options.report_copy, report);
  state.remember(-1, {{"event", "end"}, {"failed", ""}});
  state.clear_bar();
  state.print(closing_tables(state.run, state.total_s()));
  std::vector<std::filesystem::path> written = files;
  written.insert(written.end(), {path, state.metrics->path(), state.board->path()});
  if (!state.options.report_copy.empty()) written.push_back(state.options.report_copy);
  std::vector<std::vector<std::string>> rows;
  for (const std::filesystem::path& file : written) {
    std::error_code error;
    const auto size = std::filesystem::file_size(file, error);
    rows.push_back({"  " + file.lexically_normal().string(), error ? "" : words_for_bytes(size)});
  }
  state.print("files:\n" + table_of(rows, 1));
}

void RunLog::fail(const std::string& reason, const std::string& weights_sha256) {
  State& state = *state_;
  state.clear_bar();
  if (!files_made()) return;
  nlohmann::ordered_json report = report_of(state.run, state.total_s(), weights_sha256);
  report["failed"] = reason;
  try {
    write_report(state.options.output / "report.json", report);
    state.remember(-1, {{"event", "end"}, {"failed", reason}});
  } catch (const Error&) {  // the disk that is full may be why the run failed
  }
}

}  // namespace lockstep
