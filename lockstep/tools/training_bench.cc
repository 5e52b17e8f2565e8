// lockstep bench training: steps of one of five works on this machine, a mode after another, each
// with workers of its own.
#include "lockstep/tools/training_bench.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "lockstep/base/file.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/append_file.h"
#include "lockstep/tools/job_workers.h"
#include "lockstep/tools/output_folder.h"

namespace lockstep {
namespace {

struct Flags {
  std::vector<std::string> works = {"W1"}, modes = {"shared_weights"};
  int workers = 2, threads = 1;
  double seconds = 10;
  std::string precision = "fp32", json;
};

void add_flags(CLI::App& app, Flags& flags) {
  app.add_option("--work", flags.works, "W1, W2, W3, W4, W5; several with commas")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--mode", flags.modes,
                 "shared_weights, data_parallel, independent; several with commas")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--workers", flags.workers, "processes")->capture_default_str();
  app.add_option("--threads", flags.threads, "of each worker")->capture_default_str();
  app.add_option("--seconds", flags.seconds, "measured, each")->capture_default_str();
  app.add_option("--precision", flags.precision, "fp32 or bf16")->capture_default_str();
  app.add_option("--json", flags.json, "a file for one JSON object a line");
}

void check(const Flags& flags) {
  if (flags.workers < 1 || flags.workers > kMaxSeats)
    throw ConfigError(fmt::format("--workers {} is not from 1 to {}", flags.workers, kMaxSeats));
  if (flags.threads < 1) throw ConfigError(fmt::format("--threads {} is none", flags.threads));
  if (!(flags.seconds > 0 && flags.seconds <= 1e6))
    throw ConfigError(fmt::format("--seconds {} is not above 0", flags.seconds));
  if (flags.precision != "fp32" && flags.precision != "bf16")
    throw ConfigError(fmt::format("--precision {}: no such precision", flags.precision),
                      "fp32 or bf16");
  if (!flags.json.empty()) check_writable_place(flags.json, "--json");
}

// The ranks' numbers as one line. Rates add up: each rank's samples over its own seconds.
nlohmann::ordered_json summary(const Flags& flags, const std::string& work, const std::string& mode,
                               const std::vector<nlohmann::json>& ranks) {
  double rate = 0, seconds = 0;
  std::int64_t memory = 0, faults = 0, steps = 0;
  for (const nlohmann::json& rank : ranks) {
    steps = rank.at("steps");
    const double own = rank.at("seconds");
    rate += static_cast<double>(steps) * rank.at("batch_size").get<double>() / own;
    seconds = std::max(seconds, own);
    memory = std::max(memory, rank.at("peak_memory_bytes").get<std::int64_t>());
    faults += rank.at("page_faults").get<std::int64_t>();
  }
  const double all_steps = static_cast<double>(steps) * static_cast<double>(ranks.size());
  return {{"work", work},
          {"mode", mode},
          {"precision", flags.precision},
          {"workers", flags.workers},
          {"threads", flags.threads},
          {"batch_size", ranks[0].at("batch_size")},
          {"parameters", ranks[0].at("parameters")},
          {"samples_per_s", rate},
          {"steps", steps},
          {"seconds", seconds},
          {"page_faults_per_step", static_cast<double>(faults) / all_steps},
          {"peak_memory_bytes", memory}};
}

nlohmann::ordered_json measure(const Flags& flags, const std::string& work,
                               const std::string& mode) {
  WorkerJob run;
  run.command = "bench";
  // The bench has no job of its own; this one says how many workers and threads.
  run.job = resolve_job("linear-regression",
                        {{"workers.count", fmt::format("{}", flags.workers), "--workers"},
                         {"workers.threads", fmt::format("{}", flags.threads), "--threads"}});
  run.agent.segment = Segment::create({.seats = flags.workers});
  run.agent.environment["LOCKSTEP_BENCH"] = nlohmann::json{
      {"work", work},
      {"mode", mode},
      {"seconds", flags.seconds},
      {"precision", flags.precision}}.dump();
  std::vector<nlohmann::json> ranks;
  run.agent.on_event = [&](int, const nlohmann::json& event) {
    if (event.at("event") == "solution") ranks.push_back(event.at("values"));
  };
  run.agent.on_line = [](int rank, bool, std::string_view line) {
    print_error(fmt::format("[rank {}] {}\n", rank, line));
  };
  run_worker_job(run);
  if (ranks.size() != static_cast<std::size_t>(flags.workers))
    throw Error(
        fmt::format("{} of {} workers said what they measured", ranks.size(), flags.workers));
  return summary(flags, work, mode, ranks);
}

}  // namespace

int bench_training(const std::vector<std::string>& arguments) {
  CLI::App app("Times training steps on made-up data, all workers on this machine.",
               "lockstep bench training");
  Flags flags;
  add_flags(app, flags);
  if (!parse_arguments(app, arguments)) return 0;
  check(flags);
  std::optional<AppendFile> json;
  if (!flags.json.empty()) json.emplace(flags.json);
  print(fmt::format("{:<5} {:<15} {:>9} {:>14} {:>9} {:>14} {:>12}\n", "work", "mode", "precision",
                    "samples/s", "steps", "faults a step", "memory MB"));
  for (const std::string& work : flags.works)
    for (const std::string& mode : flags.modes) {
      const nlohmann::ordered_json line = measure(flags, work, mode);
      print(fmt::format("{:<5} {:<15} {:>9} {:>14.1f} {:>9} {:>14.1f} {:>12.0f}\n", work, mode,
                        flags.precision, line["samples_per_s"].get<double>(),
                        line["steps"].get<std::int64_t>(),
                        line["page_faults_per_step"].get<double>(),
                        line["peak_memory_bytes"].get<double>() / 1e6));
      if (json) json->append(as_byte_span(line.dump() + "\n"));
    }
  return 0;
}

}  // namespace lockstep
