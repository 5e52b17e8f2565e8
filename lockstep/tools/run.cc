// lockstep run: torchrun for any program.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sched.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "lockstep/base/numbers.h"
#include "lockstep/cluster/agent.h"
#include "lockstep/memory/segment.h"
#include "lockstep/tools/commands.h"
#include "lockstep/tools/control_flags.h"
#include "lockstep/tools/hostfile.h"
#include "lockstep/tools/inject_flags.h"
#include "lockstep/tools/node_flags.h"

namespace lockstep {
namespace {

struct RunFlags {
  std::string workers = "1";
  int max_restarts = 0, standby = 0;
  double restart_window_s = 60, hang_timeout_s = 60;
  std::string master_addr, role = "default";
  int master_port = 0;  // 0: a free one
  std::string unused;
  InjectFlags inject;
  ControlFlags control;
  NodeFlags nodes;
  bool standalone = false, no_python = false;
  int shutdown_timeout = 5;
};

// torchrun's flags that would change what the user gets, and what to do instead.
struct Refused {
  const char* name;  // and its short form
  bool has_value;
  const char* why;
  const char* hint;
};
constexpr const char* kNoLogs = "this version keeps no log files";
constexpr const char* kRedirect = "redirect the output of lockstep run: each line carries its rank";
constexpr const char* kNoPython = "torchrun's --module and --run-path run Python modules";
constexpr const char* kNameIt = "name the program, as in: lockstep run -- python3 -m my_module";
constexpr std::array kRefused = {
    Refused{"--log-dir", true, kNoLogs, kRedirect},
    Refused{"--logs-specs", true, kNoLogs, kRedirect},
    Refused{"--redirects,-r", true, kNoLogs, kRedirect},
    Refused{"--tee,-t", true, kNoLogs, kRedirect},
    Refused{"--duplicate-stdout-filters", true, kNoLogs, kRedirect},
    Refused{"--duplicate-stderr-filters", true, kNoLogs, kRedirect},
    Refused{"--local-ranks-filter", true, "this version shows the output of every worker",
            "each line carries its rank: pipe it through grep '^.rank 0.'"},
    Refused{"--module,-m", false, kNoPython, kNameIt},
    Refused{"--run-path", false, kNoPython, kNameIt},
    Refused{"--virtual-local-rank", false, "LOCAL_RANK is always the worker's own number",
            "leave it out"},
    Refused{"--signals-to-handle", true, "always SIGINT, SIGTERM, SIGHUP and SIGQUIT",
            "leave it out"},
    Refused{"--numa-binding", true, "this version binds no worker to a part of the machine",
            "start the program through numactl"},
};

void add_refused(CLI::App& app, const Refused& refused) {
  const auto refuse = [&refused](const auto&) {
    const std::string_view name = refused.name;
    throw ConfigError(fmt::format("{}: {}", name.substr(0, name.find(',')), refused.why),
                      refused.hint);
  };
  const std::string_view names = refused.name;
  const std::string_view name = names.substr(0, names.find(','));
  const std::string all = both_spellings(name) + std::string(names.substr(name.size()));
  if (refused.has_value)
    app.add_option_function<std::string>(all, refuse)->group("");
  else
    app.add_flag_function(all, refuse)->group("");
}

void add_flags(CLI::App& app, RunFlags& flags) {
  app.option_defaults()->take_last();
  const auto add = [&](const char* name, auto& value, const char* meaning) {
    return app.add_option(both_spellings(name), value, meaning)->capture_default_str();
  };
  add("--nproc-per-node", flags.workers,
      "workers on this node: a number, or auto or cpu for one a core; MIN:MAX where the program is "
      "elastic");
  add("--max-restarts", flags.max_restarts,
      "how often workers are started again: one that died where the program is elastic, else all")
      ->check(CLI::NonNegativeNumber);
  add("--restart-window", flags.restart_window_s, "elastic: seconds that they are counted within")
      ->check(CLI::PositiveNumber);
  add("--standby", flags.standby, "elastic: workers more that are ready to fill in")
      ->check(CLI::Range(0, kMaxSeats / 2));
  add("--hang-timeout", flags.hang_timeout_s,
      "elastic: seconds without progress until a worker is replaced; 0: never")
      ->check(CLI::NonNegativeNumber);
  add("--master-addr", flags.master_addr, "told to the workers as MASTER_ADDR; default: node 0");
  add("--master-port", flags.master_port, "told to the workers as MASTER_PORT; 0: a free one");
  add("--role", flags.role, "told to the workers as ROLE_NAME");
  app.add_flag("--standalone", flags.standalone, "accepted: it is always so on one node");
  app.add_flag(both_spellings("--no-python"), flags.no_python,
               "accepted: PROGRAM is always started as it is");
  add("--shutdown-timeout", flags.shutdown_timeout, "seconds from SIGTERM to SIGKILL when ending");
  for (const char* name : {"--rdzv-backend", "--rdzv-conf", "--monitor-interval", "--start-method",
                           "--local-addr", "--event-log-handler"})
    add(name, flags.unused, "without meaning here")->group(kWithoutMeaning);
  add_inject_flags(app, flags.inject);
  add_control_flags(app, flags.control);
  add_node_flags(app, flags.nodes);
  for (const Refused& refused : kRefused) add_refused(app, refused);
}

int worker_count(const std::string& text) {
  if (text == "auto" || text == "cpu") {
    cpu_set_t cores;
    return ::sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
  }
  if (text == "gpu" || text == "xpu")
    throw ConfigError(fmt::format("--nproc-per-node {}: no GPU in this version", text),
                      "a number, or auto or cpu for one worker a core");
  if (const auto count = whole_number(text, 1, kMaxSeats)) return *count;
  throw ConfigError(
      fmt::format("--nproc-per-node {} is not a number from 1 to {}", text, kMaxSeats),
      "a number, or auto or cpu for one worker a core");
}

void refuse_what_is_missing(const RunFlags& flags) {
  if (flags.shutdown_timeout < 0)
    throw ConfigError(fmt::format("--shutdown-timeout {} is negative", flags.shutdown_timeout));
  if (flags.master_port < 0 || flags.master_port > 65535)
    throw ConfigError(fmt::format("--master-port {} is not a port", flags.master_port),
                      "a number from 0 to 65535");
}

void check_streams() {
  for (const bool error : {false, true})
    if (const int reason = console().failure(error))
      throw Error(fmt::format("cannot write to standard {}: {}", error ? "error" : "output",
                              errno_text(reason)));
}

void pass_on(int rank, bool error, std::string_view line) {
  console().write(error, fmt::format("[rank {}] {}\n", rank, line));
  check_streams();
}

// What the agent does about workers that it has lost.
void pass_on_news(int rank, const nlohmann::json& event) {
  if (rank >= 0) return;
  const std::string& kind = event.at("event").get_ref<const std::string&>();
  if (kind == "generation" && event.at("generation") > 0)
    console().write(true, fmt::format("lockstep: {}\n", event.at("reason").get<std::string>()));
  if (kind == "message")
    console().write(true, fmt::format("lockstep: {}\n", event.at("text").get<std::string>()));
}

}  // namespace

int run_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app(
      "Starts a program on several workers: torchrun's flags and environment. What its\n"
      "workers print carries their rank; the death of one ends all.",
      "lockstep run");
  RunFlags flags;
  add_flags(app, flags);
  app.prefix_command();
  if (!parse_arguments(app, arguments)) return 0;
  refuse_what_is_missing(flags);
  if (!flags.nodes.hostfile.empty())
    return run_on_hosts("run", arguments, flags.nodes.hostfile, flags.nodes.ssh,
                        flags.control.key_file);
  std::vector<std::string> command = app.remaining();
  if (!command.empty() && command[0] == "--") command.erase(command.begin());
  if (command.empty())
    throw ConfigError("no program given", "lockstep run --nproc-per-node 2 ./my_program");

  AgentOptions options;
  const auto [least, most] = split_range(flags.workers);
  options.workers = worker_count(most);
  if (!least.empty()) options.least = worker_count(least);
  if (options.least > options.workers)
    throw ConfigError(fmt::format("--nproc-per-node {}: MIN is more than MAX", flags.workers));
  const auto duration = [](double value) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
  };
  options.standby = flags.standby;
  options.max_restarts = flags.max_restarts;
  options.restart_window = duration(flags.restart_window_s);
  options.hang_timeout = duration(flags.hang_timeout_s);
  options.restart_all = true;
  options.command = command;
  options.environment["ROLE_NAME"] = flags.role;
  const auto place = node_place(flags.nodes, flags.control, process_environment());
  if (!flags.nodes.id.empty()) options.environment["TORCHELASTIC_RUN_ID"] = flags.nodes.id;
  options.master_addr = !flags.master_addr.empty() ? flags.master_addr
                        : place                    ? place->host
                                                   : "127.0.0.1";
  options.master_port = flags.master_port != 0 ? flags.master_port : free_port();
  options.segment =
      Segment::create({.seats = seats_for(options.workers, flags.standby,
                                          flags.max_restarts > 0 || options.least > 0)});
  options.kills = inject(flags.inject, options.workers * (place ? place->options.most : 1),
                         options.environment);
  std::optional<ControlChannel> control;
  if (place) {
    options.nodes = place->options;
    options.environment.insert(place->environment.begin(), place->environment.end());
    options.nodes->same["program"] = fmt::format("{}", fmt::join(command, " "));
    options.nodes->same["--max-restarts"] = std::to_string(flags.max_restarts);
  }
  if (!place || place->options.rank == 0) {
    control.emplace(flags.control, "", place ? place->options.most : 1);
    options.control = &control->server();
  }
  options.grace = std::chrono::seconds(flags.shutdown_timeout);
  options.on_line = pass_on;
  options.on_event = pass_on_news;
  options.console = &console();
  const AgentResult result = run_agent(options);
  if (result.ok && result.stopped) throw Preempted("stopped as asked, and saved");
  if (result.signal != 0) throw Interrupted(result.signal);
  if (result.failure) {
    print_flight_record(result.segment ? *result.segment : *options.segment,
                        fmt::format("flight_recorder-{}.json", ::getpid()));
    throw Error(describe(*result.failure));
  }
  console().flush(Deadline::never());
  check_streams();
  return 0;
}

}  // namespace lockstep
