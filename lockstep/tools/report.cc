// lockstep report: the status page of a run, finished or not, as one file.
#include <fmt/format.h>

#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "lockstep/base/file.h"
#include "lockstep/observe/append_file.h"
#include "lockstep/observe/run_log.h"
#include "lockstep/observe/status.h"
#include "lockstep/observe/words.h"
#include "lockstep/tools/commands.h"
#include "lockstep/tools/dashboard.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

// The events of a file of lines, each with its time. A line that is none (cut off, when the agent
// was killed) is passed over.
class EventFile {
 public:
  explicit EventFile(const fs::path& path) : file_(path) { next(); }
  const nlohmann::json& event() const { return event_; }  // null: no more
  double time() const { return time_; }
  void next() {
    event_ = nullptr;
    for (std::string line; event_.is_null() && std::getline(file_, line);) {
      nlohmann::json event = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!event.is_object()) continue;
      // An epoch that a checkpoint remembers has none: it was before what follows it.
      if (event.contains("time") && event["time"].is_number()) time_ = event["time"];
      event_ = std::move(event);
    }
  }

 private:
  std::ifstream file_;
  nlohmann::json event_;
  double time_ = 0;
};

void replay(const fs::path& folder, Status& status, double& last) {
  EventFile history(folder / kHistoryFile), metrics(folder / "metrics.jsonl");
  while (!history.event().is_null() || !metrics.event().is_null()) {
    const bool told = metrics.event().is_null() ||
                      (!history.event().is_null() && history.time() <= metrics.time());
    EventFile& file = told ? history : metrics;
    nlohmann::json event = file.event();
    event.erase("resumed");  // metrics.jsonl has it, too
    last = std::max(last, file.time());
    try {
      status.on_event(event.value("from", told ? -1 : 0), event, file.time());
    } catch (const nlohmann::json::exception&) {  // not one of ours
    }
    file.next();
  }
}

// Where the workers' time went, from the report, which has it as shares.
void take_ranks(const nlohmann::json& report, Status& status, double time) {
  for (const nlohmann::json& rank : report.value("ranks", nlohmann::json::array())) {
    nlohmann::json event = rank;
    event["event"] = "rank";
    for (auto& [phase, share] : rank.at("share").items())
      event["seconds"][phase] = share.get<double>() * rank.at("total_s").get<double>();
    status.on_event(0, event, time);
  }
}

nlohmann::json status_of(const fs::path& folder) {
  Status status(
      {.title = folder.lexically_normal().filename().string(), .folder = folder.string()});
  double last = 0;
  replay(folder, status, last);
  std::error_code error;
  if (fs::exists(folder / "report.json", error)) {
    try {
      take_ranks(nlohmann::json::parse(read_text_file(folder / "report.json")), status, last);
    } catch (const nlohmann::json::exception&) {  // the rest is worth a page all the same
    }
  }
  nlohmann::json page = status.json(last);
  page["made"] = std::time(nullptr);
  if (page["ended"].is_null()) {
    page["state"] = "not ended";
    page["reason"] = "no end is written down: the run goes on, or was killed";
  }
  return page;
}

}  // namespace

int report_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app("Writes DIR/report.html: the status page of a run, whole, in one file.",
               "lockstep report");
  std::string name;
  app.add_option("DIR", name, "the output folder of lockstep train");
  if (!parse_arguments(app, arguments)) return 0;
  if (name.empty()) throw ConfigError("no folder given", "lockstep report runs/fashion-mnist-1");
  const fs::path folder = name, file = folder / "report.html";
  std::error_code error;
  if (!fs::exists(folder / "job.toml", error))
    throw ConfigError(fmt::format("there is no run in {}", name),
                      "the output folder of lockstep train");
  const std::string page = status_page(status_of(folder));
  with_free_space_note(file, [&] { write_file_atomically(file, page); });
  print(fmt::format("{}  {}\n", file.string(), words_for_bytes(page.size())));
  return 0;
}

}  // namespace lockstep
