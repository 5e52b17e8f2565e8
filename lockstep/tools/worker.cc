// lockstep-worker: what the agent starts for `lockstep train`, `predict` and `bench training`.
// Links everything. Its input is the environment: the launcher's variables and LOCKSTEP_JOB, the
// resolved job. What it has to say goes to the agent as events. For `train` it is a zygote, which
// loads the data and forks the workers.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>

#include "lockstep/base/error.h"
#include "lockstep/cluster/environment.h"
#include "lockstep/cluster/world.h"
#include "lockstep/cluster/zygote.h"
#include "lockstep/job/job.h"
#include "lockstep/observe/event.h"
#include "lockstep/recipes/recipe.h"
#include "lockstep/recipes/training_bench.h"

namespace lockstep {
namespace {

std::string required(const Environment& environment, const char* name) {
  const auto found = environment.find(name);
  if (found == environment.end())
    throw ConfigError(std::string("lockstep-worker: ") + name + " is not set",
                      "start it through lockstep train or lockstep predict");
  return found->second;
}

TrainingBench bench_of(const std::string& text) {
  const nlohmann::json asked = nlohmann::json::parse(text);
  return {.work = asked.at("work"),
          .mode = asked.at("mode"),
          .seconds = asked.at("seconds"),
          .precision = asked.at("precision") == "bf16" ? Precision::bf16 : Precision::fp32};
}

// Does `work` and reports its failure as the rank's. Returns the exit code.
template <typename Rank, typename Work>
int guarded(EventSink& events, const Rank& rank, const Work& work) {
  const auto failed = [&](const char* kind, const std::exception& error, int status) {
    events.emit({{"event", "error"}, {"rank", rank()}, {"kind", kind}, {"message", error.what()}});
    return status;
  };
  try {
    work();
    return 0;
  } catch (const ConfigError& error) {
    return failed("config", error, kExitBadInput);
  } catch (const CommError& error) {
    return failed("comm", error, kExitFailedRun);
  } catch (const c10::Error& error) {  // libtorch's own: without its C++ stack
    return failed("run", Error(error.what_without_backtrace()), kExitFailedRun);
  } catch (const std::bad_alloc&) {
    return failed("run", Error("std::bad_alloc: the system refused an allocation"), kExitFailedRun);
  } catch (const std::exception& error) {
    return failed("run", error, kExitFailedRun);
  }
}

int descriptor(const Environment& environment, const char* name) {
  return std::atoi(required(environment, name).c_str());
}

// In the zygote: returns an exit code if the data cannot be loaded, and nothing in every worker.
std::optional<int> load_as_zygote(const Job& job, const Environment& environment,
                                  RecipeData& data) {
  PipeEventSink events(UniqueFd(descriptor(environment, "LOCKSTEP_EVENT_FD")));
  if (const int status = guarded(
          events, [] { return 0; }, [&] { data = load_recipe_data(job); }))
    return status;
  serve_as_zygote(descriptor(environment, "LOCKSTEP_ZYGOTE_FD"));
  return std::nullopt;
}

int run(const std::string& command) {
  Environment environment = process_environment();
  const Job job = parse_job(required(environment, "LOCKSTEP_JOB"), "LOCKSTEP_JOB");
  RecipeData data;
  if (command == "train") {
    if (const auto status = load_as_zygote(job, environment, data)) return *status;
    environment = process_environment();
  }
  const World world = init({.timeout = std::chrono::duration_cast<Clock::duration>(
                                std::chrono::duration<double>(job.workers.timeout_s)),
                            .join = command != "train"});  // once data and model are there
  return guarded(
      world.events(), [&] { return world.rank(); },
      [&] {
        at::set_num_threads(static_cast<int>(job.workers.threads));
        at::set_num_interop_threads(1);
        if (command == "train")
          run_training(world, job, data,
                       {.folder = required(environment, "LOCKSTEP_CHECKPOINTS"),
                        .resume = environment.contains("LOCKSTEP_RESUME")});
        else if (command == "bench")
          run_training_bench(world, bench_of(required(environment, "LOCKSTEP_BENCH")));
        else
          run_prediction(world, job, required(environment, "LOCKSTEP_WEIGHTS"),
                         required(environment, "LOCKSTEP_PREDICT_DATA"));
      });
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  const bool zygote = argc == 3 && std::strcmp(argv[1], "--zygote") == 0;
  const std::string command = argc == 2 || zygote ? argv[argc - 1] : "";
  if (zygote ? command != "train" : command != "predict" && command != "bench") {
    std::cerr << "lockstep-worker is started by lockstep train, predict and bench\n";
    return lockstep::kExitBadInput;
  }
  int status = lockstep::kExitFailedRun;
  try {
    status = lockstep::run(command);
  } catch (const lockstep::ConfigError& error) {
    std::cerr << "lockstep-worker: " << error.what() << '\n';
    status = lockstep::kExitBadInput;
  } catch (const std::exception& error) {
    std::cerr << "lockstep-worker: " << error.what() << '\n';
  }
  // Everything is sent and synced; tearing libtorch down would only cost time.
  std::cout.flush();
  _exit(status);
}
