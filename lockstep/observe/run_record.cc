#include "lockstep/observe/run_record.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "lockstep/observe/words.h"

namespace lockstep {
namespace {

constexpr std::array kPhases = {"data",    "forward",   "backward",   "communication",
                                "waiting", "optimizer", "evaluation", "other"};
// More epochs than these are shown by their first and last ones.
constexpr std::size_t kEpochsShown = 24, kFirstShown = 4;

double per_second(double amount, double seconds) { return seconds > 0 ? amount / seconds : 0; }

std::vector<std::string> epoch_cells(const EpochRecord& epoch) {
  return {std::to_string(epoch.epoch),
          words_for_loss(epoch.train_loss),
          epoch.test_loss ? words_for_loss(*epoch.test_loss) : "",
          epoch.test_accuracy ? fmt::format("{:.2f} %", 100 * *epoch.test_accuracy) : "",
          fmt::format("{:.2f}", epoch.seconds),
          words_for_count(epoch.samples_per_s)};
}

// Without the columns that are empty in every row but the header.
void drop_empty_columns(std::vector<std::vector<std::string>>& rows) {
  for (std::size_t column = rows[0].size(); column-- > 0;) {
    const bool empty = std::all_of(rows.begin() + 1, rows.end(),
                                   [&](const auto& row) { return row[column].empty(); });
    if (!empty || rows.size() == 1) continue;
    for (auto& row : rows) row.erase(row.begin() + static_cast<std::ptrdiff_t>(column));
  }
}

}  // namespace

double number_in(const nlohmann::json& event, const char* member) {
  const auto found = event.find(member);
  return found == event.end() || found->is_null() ? std::numeric_limits<double>::quiet_NaN()
                                                  : found->get<double>();
}

double RunRecord::training_seconds() const {
  double total = 0;
  for (const EpochRecord& epoch : epochs) total += epoch.seconds;
  return total;
}

void RunRecord::take_resumed(const nlohmann::json& progress) {
  for (const nlohmann::json& each : progress.at("epochs")) {
    if (each.at("event") != "epoch") continue;
    take(each);
    resumed_epochs.push_back(each);
  }
  clock = 0;
  step = resumed_step = progress.at("step");
  samples = samples_at_clock = progress.at("samples");
  epoch = static_cast<std::int64_t>(epochs.size()) + 1;
  loss = per_second(number_in(progress, "loss"), number_in(progress, "weight"));
}

void RunRecord::take(const nlohmann::json& event) {
  const std::string& kind = event.at("event").get_ref<const std::string&>();
  if (kind == "ready") {
    epochs_planned = event.at("epochs");
    steps_per_epoch = event.at("steps_per_epoch");
    train_samples = event.at("train_samples");
    test_samples = event.at("test_samples");
    parameters = event.at("parameters");
    if (event.contains("resumed")) take_resumed(event.at("resumed"));
  } else if (kind == "first_step") {
    // Again from every other worker that becomes rank 0.
    if (!first_step_clock) first_step_clock = event.at("clock").get<double>();
    if (clock == 0) clock = *first_step_clock;
  } else if (kind == "step") {
    const double now = event.at("clock"), passed = now - clock;
    const std::uint64_t trained = event.at("samples");
    // The first event has none before it; a short interval says little.
    if (step_clock_known && passed > 0 && trained >= samples_at_clock) {
      const double rate = static_cast<double>(trained - samples_at_clock) / passed;
      samples_per_s += (samples_per_s == 0 ? 1 : -std::expm1(-passed)) * (rate - samples_per_s);
    }
    step_clock_known = true;
    samples_at_clock = trained;
    step = event.at("step");
    epoch = event.at("epoch");
    loss = number_in(event, "loss");
    samples = trained;
    clock = now;
  } else if (kind == "epoch") {
    EpochRecord record{.epoch = event.at("epoch"), .train_loss = number_in(event, "train_loss")};
    if (event.contains("test_loss")) record.test_loss = number_in(event, "test_loss");
    if (event.contains("test_accuracy")) record.test_accuracy = number_in(event, "test_accuracy");
    record.seconds = number_in(event, "seconds");
    record.evaluation_seconds = number_in(event, "eval_seconds");
    const double trained = event.at("samples");
    double before = 0;
    for (const EpochRecord& each : epochs) before += each.samples_per_s * each.seconds;
    record.samples_per_s = per_second(trained - before, record.seconds);
    epochs.push_back(record);
    step = event.at("step");
    epoch = record.epoch;
    samples = event.at("samples");
    // The rate at the next step must not count the evaluation.
    clock += record.evaluation_seconds;
  } else if (kind == "rank") {
    ranks[event.at("rank").get<int>()] = event;
  } else if (kind == "recovery") {
    recoveries.push_back(event);
  } else if (kind == "solution") {
    solution = event.at("values");
  } else if (kind == "finished") {
    stopped_because = event.at("reason");
  }
}

std::string describe_start(const RunRecord& run) {
  std::string text =
      fmt::format("{}\n{} training", run.title, words_for_count(double(run.train_samples)));
  if (run.test_samples > 0)
    text += fmt::format(" and {} test", words_for_count(double(run.test_samples)));
  return text + fmt::format(" samples, {} parameters, {} steps an epoch\n",
                            words_for_count(double(run.parameters)),
                            words_for_count(double(run.steps_per_epoch)));
}

std::string progress_line(const RunRecord& run, int columns) {
  if (run.step == 0)
    return fmt::format("starting {} worker{} …", run.workers, run.workers == 1 ? "" : "s");
  const std::int64_t steps = std::max<std::int64_t>(run.steps_per_epoch, 1);
  const double done =
      std::clamp(double(run.step - (run.epoch - 1) * steps) / double(steps), 0.0, 1.0);
  const std::string head = fmt::format("epoch {}/{} ", run.epoch, run.epochs_planned);
  std::string tail = fmt::format(" {:3.0f} %  loss {}", 100 * done, words_for_loss(run.loss));
  if (run.samples_per_s > 0)
    tail += fmt::format("  {} samples/s", words_for_count(run.samples_per_s));
  const double elapsed = run.clock - run.first_step_clock.value_or(run.clock);
  const std::int64_t timed = run.step - run.resumed_step - 1;  // since the first one here
  if (timed > 0 && elapsed > 0) {
    const double left = double(run.epochs_planned * steps - run.step);
    tail += fmt::format("  {} left", words_for_duration(elapsed / double(timed) * left));
  }
  constexpr int kMostCells = 40, kFewestCells = 5;
  const int cells = std::min(columns - int(head.size() + tail.size()) - 3, kMostCells);
  if (cells < kFewestCells) return (head + tail).substr(0, std::size_t(std::max(columns - 1, 0)));
  const int full = int(done * cells);
  std::string bar(std::size_t(full), '=');
  if (full < cells) bar += '>';
  bar.resize(std::size_t(cells), ' ');
  return head + "[" + bar + "]" + tail;
}

std::string epoch_line(const RunRecord& run) {
  const EpochRecord& epoch = run.epochs.back();
  std::string text = fmt::format("epoch {:{}}/{}  train loss {}", epoch.epoch,
                                 std::to_string(run.epochs_planned).size(), run.epochs_planned,
                                 words_for_loss(epoch.train_loss));
  if (epoch.test_loss) text += "  test loss " + words_for_loss(*epoch.test_loss);
  if (epoch.test_accuracy) text += fmt::format("  accuracy {:.2f} %", 100 * *epoch.test_accuracy);
  return text + fmt::format("  {:.2f} s  {} samples/s", epoch.seconds,
                            words_for_count(epoch.samples_per_s));
}

std::string recovery_line(const RunRecord& run) {
  const nlohmann::json& recovery = run.recoveries.back();
  const double rejoined = number_in(recovery, "rejoined_seconds");
  return fmt::format("recovered: rank {}, {}: next step after {:.2f} s, {} redone, from {}; {}",
                     recovery.at("rank").get<int>(), recovery.at("cause").get<std::string>(),
                     recovery.at("seconds").get<double>(),
                     words_for_count(recovery.at("steps_redone").get<double>()),
                     recovery.at("source").get<std::string>(),
                     std::isnan(rejoined) ? std::string("not replaced")
                                          : fmt::format("replaced after {:.2f} s", rejoined));
}

std::string closing_tables(const RunRecord& run, double total_s) {
  std::vector<std::vector<std::string>> rows = {
      {"epoch", "train loss", "test loss", "accuracy", "seconds", "samples/s"}};
  const std::size_t count = run.epochs.size();
  for (std::size_t i = 0; i < count; ++i) {
    if (count > kEpochsShown && i == kFirstShown) {
      rows.push_back({"...", "", "", "", "", ""});
      i = count - (kEpochsShown - kFirstShown);
    }
    rows.push_back(epoch_cells(run.epochs[i]));
  }
  drop_empty_columns(rows);
  std::string text = "\n" + table_of(rows) + "\n";

  if (!run.ranks.empty()) {
    rows = {{"rank"}};
    for (const char* phase : kPhases) rows[0].push_back(phase);
    rows[0].insert(rows[0].end(), {"hidden", "CPU", "memory"});
    for (const auto& [rank, event] : run.ranks) {
      std::vector<std::string> row = {std::to_string(rank)};
      const auto percent = [&total = event.at("total_s")](double part) {
        return fmt::format("{:.0f} %", 100 * per_second(part, total));
      };
      for (const char* phase : kPhases)
        row.push_back(percent(event.at("seconds").value(phase, 0.0)));
      const auto queued = event.find("queued");
      row.push_back(queued == event.end() ? "" : percent(queued->at("hidden")));
      row.push_back(percent(event.at("cpu_s")));
      row.push_back(words_for_bytes(event.at("peak_memory_bytes")));
      rows.push_back(std::move(row));
    }
    drop_empty_columns(rows);
    text += table_of(rows) + "\n";
  }
  text += fmt::format("{:.2f} s in all", total_s);
  if (run.first_step_clock)
    text += fmt::format(", {:.2f} s to the first step", *run.first_step_clock - run.start_clock);
  if (run.training_seconds() > 0)
    text += fmt::format(", {} samples/s",
                        words_for_count(double(run.samples) / run.training_seconds()));
  if (!run.stopped_because.empty()) text += "; stopped: " + run.stopped_because;
  return text + "\n";
}

nlohmann::ordered_json report_of(const RunRecord& run, double total_s,
                                 const std::string& weights_sha256) {
  using Json = nlohmann::ordered_json;
  Json report = {{"title", run.title}, {"workers", run.workers}};
  report["train_samples"] = run.train_samples;
  report["test_samples"] = run.test_samples;
  report["parameters"] = run.parameters;
  report["epochs"] = Json::array();
  for (const EpochRecord& epoch : run.epochs) {
    Json entry = {{"epoch", epoch.epoch}, {"train_loss", epoch.train_loss}};
    if (epoch.test_loss) entry["test_loss"] = *epoch.test_loss;
    if (epoch.test_accuracy) entry["test_accuracy"] = *epoch.test_accuracy;
    entry["seconds"] = epoch.seconds;
    entry["evaluation_seconds"] = epoch.evaluation_seconds;
    entry["samples_per_s"] = epoch.samples_per_s;
    report["epochs"].push_back(std::move(entry));
  }
  if (run.resumed_step > 0) report["resumed_step"] = run.resumed_step;
  report["samples_per_s"] = per_second(double(run.samples), run.training_seconds());
  report["start_to_first_step_s"] =
      run.first_step_clock ? Json(*run.first_step_clock - run.start_clock) : Json();
  report["total_s"] = total_s;
  report["weights_sha256"] = weights_sha256.empty() ? Json() : Json(weights_sha256);
  report["stopped_because"] = run.stopped_because;
  if (!run.solution.is_null()) report["solution"] = Json(run.solution);
  report["recoveries"] = Json::array();
  for (const nlohmann::json& event : run.recoveries) {
    Json recovery = Json(event);
    recovery.erase("event");
    report["recoveries"].push_back(std::move(recovery));
  }
  report["ranks"] = Json::array();
  for (const auto& [rank, event] : run.ranks) {
    const double total = event.at("total_s"), cpu = event.at("cpu_s");
    Json share;
    for (const char* phase : kPhases)
      share[phase] = per_second(event.at("seconds").value(phase, 0.0), total);
    report["ranks"].push_back({{"rank", rank},
                               {"share", std::move(share)},
                               {"total_s", total},
                               {"cpu_s", cpu},
                               {"cpu_use", per_second(cpu, total)},
                               {"peak_memory_bytes", Json(event.at("peak_memory_bytes"))}});
    if (const auto queued = event.find("queued"); queued != event.end())
      report["ranks"].back().update({{"hidden_s", queued->at("hidden").get<double>()},
                                     {"exposed_s", queued->at("exposed").get<double>()}});
  }
  return report;
}

}  // namespace lockstep
