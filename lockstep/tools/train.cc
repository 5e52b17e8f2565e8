// lockstep train: a recipe or a job file, trained on several workers.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "lockstep/base/file.h"
#include "lockstep/base/numbers.h"
#include "lockstep/job/job.h"
#include "lockstep/job/schema.h"
#include "lockstep/observe/event.h"
#include "lockstep/observe/run_log.h"
#include "lockstep/observe/status.h"
#include "lockstep/tools/commands.h"
#include "lockstep/tools/control_flags.h"
#include "lockstep/tools/dashboard.h"
#include "lockstep/tools/hostfile.h"
#include "lockstep/tools/inject_flags.h"
#include "lockstep/tools/job_workers.h"
#include "lockstep/tools/node_flags.h"
#include "lockstep/tools/output_folder.h"
#include "lockstep/tools/snapshot_saver.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

struct TrainFlags {
  std::string name, workers, threads, epochs, data, output, report, resume, hang_timeout, dashboard;
  std::vector<std::string> settings;
  AgentOptions agent;
  double restart_window_s = 60;
  InjectFlags inject;
  ControlFlags control;
  NodeFlags nodes;
  std::optional<NodePlace> place;  // where there are several
  bool quiet = false, overwrite = false, auto_resume = false;
};

void add_flags(CLI::App& app, TrainFlags& flags) {
  app.option_defaults()->take_last();
  app.add_option("NAME", flags.name,
                 fmt::format("a job file, or a recipe: {}", fmt::join(recipe_names(), ", ")));
  app.add_option("--workers", flags.workers,
                 "processes (workers.count); MIN:MAX: goes on with MIN, has MAX where it can; with "
                 "--nnodes: on each node");
  app.add_option("--max-restarts", flags.agent.max_restarts,
                 "workers that die or hang are replaced, so many within the window; 0: one's "
                 "death ends the run")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--restart-window", flags.restart_window_s, "seconds")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--standby", flags.agent.standby, "workers more that are ready to fill in")
      ->check(CLI::Range(0, kMaxSeats / 2))
      ->capture_default_str();
  app.add_option("--hang-timeout", flags.hang_timeout,
                 "seconds without progress until a worker is replaced (workers.hang_timeout_s)");
  app.add_option("--threads", flags.threads, "of each worker (workers.threads)");
  app.add_option("--epochs", flags.epochs, "passes over the data (train.epochs)");
  app.add_option("--data", flags.data, "folder or file with the data");
  app.add_option("--set", flags.settings, "KEY=VALUE: any setting of the job file; repeatable")
      ->take_all()
      ->expected(1);
  app.add_option("--output", flags.output, "folder for what is written; default runs/NAME-N");
  app.add_option("--resume", flags.resume,
                 "go on with the run in this output folder, from its last checkpoint");
  app.add_flag("--auto-resume", flags.auto_resume,
               "go on with the run in the --output folder if there is one, else begin it");
  app.add_option("--report", flags.report, "a second copy of report.json");
  app.add_option("--dashboard", flags.dashboard,
                 "serve a live status page on this port of 127.0.0.1; 0: a free one, printed");
  add_inject_flags(app, flags.inject);
  add_control_flags(app, flags.control);
  add_node_flags(app, flags.nodes);
  app.add_flag("--quiet", flags.quiet, "print nothing");
  app.add_flag("--overwrite", flags.overwrite, "replace the run in the output folder");
}

std::vector<Override> overrides_of(const TrainFlags& flags) {
  std::vector<Override> overrides;
  for (const std::string& setting : flags.settings) {
    const std::size_t equals = setting.find('=');
    if (equals == std::string::npos || equals == 0)
      throw ConfigError(fmt::format("--set {} is not KEY=VALUE", setting),
                        "--set optimizer.lr=1e-4");
    overrides.push_back({setting.substr(0, equals), setting.substr(equals + 1), "--set"});
  }
  const auto add = [&](const char* key, const std::string& value, const char* flag) {
    if (!value.empty()) overrides.push_back({key, value, flag});
  };
  const auto [least, most] = split_range(flags.workers);
  const auto times = [](const std::string& count, int nodes) {
    const auto value = whole_number(count, 1, 1 << 20);
    return value ? std::to_string(*value * nodes) : count;
  };
  const int nodes = flags.place ? flags.place->options.most : 1;
  const int least_nodes = flags.place ? flags.place->options.least : 1;
  add("workers.count", times(most, nodes), "--workers");
  const bool fewer = !least.empty() || least_nodes < nodes;
  if (!flags.workers.empty())
    add("workers.min", fewer ? times(least.empty() ? most : least, least_nodes) : "0", "--workers");
  add("workers.hang_timeout_s", flags.hang_timeout, "--hang-timeout");
  add("workers.threads", flags.threads, "--threads");
  add("train.epochs", flags.epochs, "--epochs");
  if (!flags.data.empty()) add("data", job::toml_string(flags.data), "--data");
  return overrides;
}

std::string title_of(const Job& job) {
  std::string model = job.model.name;
  if (model == "mlp") model += fmt::format(" {}", fmt::join(job.model.widths, "-"));
  while (model.ends_with(' ')) model.pop_back();
  return fmt::format("{}: {}, {} {:g}, {} worker{}, batches of {}", job.recipe, model,
                     job.optimizer.name, job.optimizer.lr, job.workers.count,
                     job.workers.count == 1 ? "" : "s", job.train.global_batch_size);
}

int terminal_columns() {
  winsize size{};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  const char* columns = std::getenv("COLUMNS");
  const int count = columns != nullptr ? std::atoi(columns) : 0;
  return count > 0 ? count : 80;
}

bool on_a_terminal() {
  const char* kind = std::getenv("TERM");
  return ::isatty(STDOUT_FILENO) == 1 && (kind == nullptr || std::string_view(kind) != "dumb");
}

OutputFolder folder_for(const Job& job, const TrainFlags& flags) {
  if (!flags.resume.empty()) return OutputFolder::resume(flags.resume);
  const std::string& path = flags.output.empty() ? job.output : flags.output;
  return path.empty() ? OutputFolder::next_free("runs", job.recipe)
                      : OutputFolder::at(path, flags.overwrite || flags.auto_resume);
}

// The status page of a job that goes on.
struct Page {
  Status status;
  Dashboard dashboard;
  Start start;

  void take(int rank, const nlohmann::json& event) { status.on_event(rank, event, now()); }
  void tick() {
    if (dashboard.wants_snapshot()) dashboard.publish(status.json(now()));
  }
  double now() const { return start.time + monotonic_seconds() - start.clock; }
};

std::unique_ptr<Page> page_for(const Job& job, const TrainFlags& flags, const fs::path& folder,
                               const Start& start) {
  if (flags.dashboard.empty()) return nullptr;
  std::unique_ptr<Page> page(new Page{
      .status = Status(
          {.title = title_of(job),
           .folder = folder.string(),
           .workers = static_cast<int>(job.workers.count),
           .least = static_cast<int>(job.workers.min > 0 ? job.workers.min : job.workers.count),
           .started = start.time,
           .hang_timeout_s = job.workers.timeout_s}),
      .dashboard = Dashboard(flags.dashboard, "--dashboard", job.workers.timeout_s),
      .start = start});
  page->tick();
  if (!flags.quiet) print("status page: " + page->dashboard.url() + "\n");
  return page;
}

WorkerJob worker_job(const Job& job, const TrainFlags& flags) {
  WorkerJob run;
  run.command = "train";
  run.job = job;
  run.agent = flags.agent;
  run.agent.restart_window = std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(flags.restart_window_s));
  if (job.train.strategy != "shared_weights") {  // replicas are not recovered
    run.agent.elastic = false;
    run.agent.max_restarts = 0;
  }
  int here = static_cast<int>(job.workers.count);
  if (flags.place) {
    run.agent.nodes = flags.place->options;
    run.agent.master_addr = flags.place->host;
    run.agent.environment = flags.place->environment;
    if (here % run.agent.nodes->most != 0)
      throw ConfigError(fmt::format("{} workers on {} nodes: not the same number on each", here,
                                    run.agent.nodes->most),
                        "--workers says how many on each");
    here /= run.agent.nodes->most;
    run.agent.nodes->same["job"] = to_toml(job);
    run.agent.nodes->same["--max-restarts"] = std::to_string(flags.agent.max_restarts);
    run.agent.nodes->same["--standby"] = std::to_string(flags.agent.standby);
  }
  run.agent.segment = Segment::create(
      {.seats = seats_for(here, flags.agent.standby, flags.agent.max_restarts > 0)});
  return run;
}

// What other nodes than the first do: the run's folder is there.
void train_here(const Job& job, const TrainFlags& flags) {
  WorkerJob run = worker_job(job, flags);
  const int workers = static_cast<int>(job.workers.count);
  const std::string& given = !flags.resume.empty() ? flags.resume : flags.output;
  // Used where rank 0 should come to be here.
  const fs::path folder = !given.empty() ? given : fmt::format("runs/{}-node", job.recipe);
  run.agent.environment["LOCKSTEP_CHECKPOINTS"] = (folder / "checkpoints").string();
  // Whether there is something to go on from, node 0 says.
  if (run.agent.elastic) run.agent.environment["LOCKSTEP_RESUME"] = "1";
  run.agent.kills = inject(flags.inject, workers, run.agent.environment);
  run.agent.on_event = [&](int rank, const nlohmann::json& event) {
    const std::string& kind = event.at("event").get_ref<const std::string&>();
    if (flags.quiet || rank >= 0) return;
    if (kind == "message") print(event.at("text").get<std::string>() + "\n");
    if (kind == "generation" && event.at("generation") > 0)
      print(event.at("reason").get<std::string>() + "\n");
  };
  run.agent.on_line = [](int rank, bool error, std::string_view line) {
    (error ? print_error : print)(fmt::format("[rank {}] {}\n", rank, line));
  };
  if (run_worker_job(run)) throw Preempted("stopped as asked; node 0 has saved");
}

void train(const Job& job, const TrainFlags& flags, const Start& start) {
  if (flags.place && flags.place->options.rank > 0) return train_here(job, flags);
  OutputFolder folder = folder_for(job, flags);
  if (!flags.report.empty()) {
    check_writable_place(flags.report, "--report");
    refuse_file_of_a_run(flags.report, folder.path(), "--report");
  }
  const auto page = page_for(job, flags, folder.path(), start);
  const int workers = static_cast<int>(job.workers.count);
  WorkerJob run = worker_job(job, flags);
  run.agent.environment["LOCKSTEP_CHECKPOINTS"] = folder.checkpoints().string();
  if (!flags.resume.empty()) run.agent.environment["LOCKSTEP_RESUME"] = "1";
  run.agent.kills = inject(flags.inject, workers, run.agent.environment);
  ControlChannel control(flags.control, folder.path(), run.agent.nodes ? run.agent.nodes->most : 1);
  run.agent.control = &control.server();
  SnapshotSaver snapshots(folder.path() / "model.safetensors", run.agent.segment);
  RunLog log({.output = folder.path(),
              .report_copy = flags.report,
              .quiet = flags.quiet,
              .terminal = on_a_terminal(),
              .columns = terminal_columns(),
              .workers = workers,
              .resume = !flags.resume.empty(),
              .start_clock = start.clock,
              .start_time = start.time,
              .title = title_of(job),
              .clock = monotonic_seconds,
              .print = print});
  std::string ended_because;
  run.agent.on_event = [&](int rank, const nlohmann::json& event) {
    if (event.at("event") == "finished") ended_because = event.at("reason");
    if (event.at("event") == "snapshot") snapshots.take(event);
    if (event.at("event") == "ready" && !log.files_made()) folder.begin(to_toml(job));
    log.on_event(rank, event);
    if (page) page->take(rank, event);
  };
  run.agent.on_line = [&](int rank, bool error, std::string_view line) {
    const std::string text = fmt::format("[rank {}] {}", rank, line);
    if (page) page->take(rank, {{"event", "output"}, {"text", line}});
    if (error)
      print_error(text + "\n");
    else
      log.print_line(text);
  };
  run.agent.on_tick = [&] {
    if (log.files_made()) snapshots.save();
    if (console().idle()) log.on_tick();  // no new bar before the last one is shown
    if (page) page->tick();
  };
  try {
    const bool asked_to_stop = run_worker_job(run);
    if (!log.files_made()) throw Error("the workers ended without having trained");
    snapshots.save();
    if (snapshots.sha256().empty()) throw Error("the workers ended without a model");
    if (asked_to_stop && ended_because == kAskedToStop)
      throw Preempted(
          fmt::format("stopped as asked, and saved; go on with: lockstep train "
                      "--resume {}",
                      folder.path().string()));
    log.finish(snapshots.sha256(), {folder.path() / "job.toml", snapshots.file()});
  } catch (const std::exception& error) {
    const std::string reason = error.what();
    try {
      if (log.files_made()) snapshots.save();  // the last good one, however the job ended
    } catch (const std::exception& also) {
      if (reason != also.what()) print_error(fmt::format("lockstep: {}\n", also.what()));
    }
    log.fail(reason, snapshots.sha256());
    if (page) page->take(-1, {{"event", "end"}, {"failed", reason}}), page->tick();
    const bool failed = dynamic_cast<const Interrupted*>(&error) == nullptr &&
                        dynamic_cast<const Preempted*>(&error) == nullptr &&
                        dynamic_cast<const ConfigError*>(&error) == nullptr;
    if (failed && log.files_made())
      print_flight_record(*run.agent.segment, folder.path() / "flight_recorder.json");
    throw;
  }
}

// Why the run ended, if it did.
std::string reason_of_end(const fs::path& folder) {
  std::error_code error;
  if (!fs::exists(folder / "report.json", error)) return "";
  const auto report = nlohmann::json::parse(read_text_file(folder / "report.json"), nullptr,
                                            /*allow_exceptions=*/false);
  if (!report.is_object() || report.contains("failed")) return "";
  return report.value("stopped_because", "");
}

void resume(const TrainFlags& flags, const Start& start) {
  const auto refuse = [&](bool given, const char* what, const char* hint) {
    if (given) throw ConfigError(fmt::format("{} does not go with --resume", what), hint);
  };
  refuse(!flags.name.empty(), "a job file or a recipe", "the run's own job.toml says what it is");
  refuse(!flags.output.empty(), "--output", "it goes on where it was begun");
  refuse(flags.overwrite, "--overwrite", "leave it out");
  const fs::path folder = flags.resume;
  if (const std::string reason = reason_of_end(folder); !reason.empty()) {
    if (!flags.quiet) print(fmt::format("the run in {} is finished: {}\n", flags.resume, reason));
    return;
  }
  std::error_code error;
  if (!fs::exists(folder / "job.toml", error)) OutputFolder::resume(folder);  // says what is wrong
  train(resolve_job((folder / "job.toml").string(), overrides_of(flags)), flags, start);
}

}  // namespace

int train_command(const std::vector<std::string>& arguments, const Start& start) {
  CLI::App app("Trains a recipe or a job file on several workers.", "lockstep train");
  TrainFlags flags;
  flags.agent.elastic = true;
  flags.agent.max_restarts = 10;
  add_flags(app, flags);
  if (!parse_arguments(app, arguments)) return 0;
  if (!flags.nodes.hostfile.empty())
    return run_on_hosts("train", arguments, flags.nodes.hostfile, flags.nodes.ssh,
                        flags.control.key_file);
  flags.place = node_place(flags.nodes, flags.control, process_environment());
  if (flags.auto_resume) {
    if (flags.output.empty() || flags.overwrite)
      throw ConfigError("--auto-resume goes with --output, and not with --overwrite",
                        "--output names the folder of the run");
    if (std::error_code error; fs::exists(fs::path(flags.output) / "job.toml", error)) {
      flags.resume = std::exchange(flags.output, "");
      flags.name.clear();
    }
  }
  if (!flags.resume.empty()) {
    resume(flags, start);
    return 0;
  }
  if (flags.name.empty())
    throw ConfigError("no recipe and no job file given",
                      fmt::format("a job file, or one of {}", fmt::join(recipe_names(), ", ")));
  train(resolve_job(flags.name, overrides_of(flags)), flags, start);
  return 0;
}

}  // namespace lockstep
