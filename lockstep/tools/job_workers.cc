#include "lockstep/tools/job_workers.h"

#include <fmt/format.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "lockstep/tools/commands.h"

namespace lockstep {
namespace {

std::string worker_program() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::filesystem::path program = self.parent_path() / "lockstep-worker";
  if (error || !std::filesystem::exists(program, error))
    throw Error(
        fmt::format("there is no {}: it belongs beside lockstep (a build without libtorch "
                    "has none)",
                    program.string()));
  return program.string();
}

struct Report {
  int rank = -1;
  std::string message;
};

[[noreturn]] void throw_cause(const AgentResult& result,
                              const std::map<std::string, Report>& errors) {
  const auto reported = [&](const char* kind) -> const Report* {
    const auto found = errors.find(kind);
    return found == errors.end() ? nullptr : &found->second;
  };
  if (const Report* config = reported("config")) throw ConfigError(config->message);
  if (const Report* run = reported("run")) throw Error(run->message);
  if (result.signal != 0) throw Interrupted(result.signal);
  if (result.stopped) throw Error("the job was ended by a request, before it could save");
  LOCKSTEP_CHECK(result.failure.has_value());
  const Report* comm = reported("comm");
  if (comm != nullptr && comm->rank == result.failure->rank)
    throw Error(
        fmt::format("rank {} (pid {}): {}", comm->rank, result.failure->pid, comm->message));
  throw Error(describe(*result.failure));
}

}  // namespace

bool run_worker_job(const WorkerJob& job) {
  AgentOptions options = job.agent;
  const WorkerSettings& settings = job.job.workers;
  // The job's are all nodes'.
  options.workers = static_cast<int>(settings.count) / (options.nodes ? options.nodes->most : 1);
  options.least = static_cast<int>(settings.min) / (options.nodes ? options.nodes->least : 1);
  options.zygote = job.command == "train";
  options.command = {worker_program(), job.command};
  if (options.zygote) options.command.insert(options.command.begin() + 1, "--zygote");
  options.environment["LOCKSTEP_JOB"] = to_toml(job.job);
  options.threads = static_cast<int>(settings.threads);
  if (options.elastic) {
    const auto duration = [](double value) {
      return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
    };
    // Whoever keeps the others waiting for longer than a collective may take ends them.
    options.hang_timeout = duration(std::min(settings.hang_timeout_s, settings.timeout_s));
    options.start_timeout = duration(settings.timeout_s);
  }
  options.console = &console();
  std::map<std::string, Report> errors;  // by kind, the first of each
  options.on_event = [&](int rank, const nlohmann::json& event) {
    if (event.at("event") == "recovered") errors.clear();  // of those that were replaced
    if (event.at("event") == "error")
      errors.try_emplace(event.at("kind"), Report{rank, event.at("message")});
    else
      job.agent.on_event(rank, event);
  };
  const AgentResult result = run_agent(options);
  if (!result.ok) throw_cause(result, errors);
  return result.stopped;
}

}  // namespace lockstep
