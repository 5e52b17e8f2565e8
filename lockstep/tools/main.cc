// lockstep: starts, watches and ends workers; links no torch. This file only dispatches.
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>

#include <array>
#include <ctime>
#include <string>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/job/nearest.h"
#include "lockstep/tools/commands.h"

namespace lockstep {
namespace {

struct Command {
  const char* name;
  const char* meaning;
  int (*run)(const std::vector<std::string>&, const Start&);
};
constexpr std::array kCommands = {
    Command{"train", "train a recipe or a job file on several workers", train_command},
    Command{"predict", "apply a trained model to data, split over workers", predict_command},
    Command{"run", "start a program of your own on several workers, as torchrun does", run_command},
    Command{"scale", "change the number of workers of a running job; list the jobs", scale_command},
    Command{"status", "say what a running job does", status_command},
    Command{"stop", "have a running job finish its step, save and end", stop_command},
    Command{"key", "make a key for the control of jobs from other machines", key_command},
    Command{"report", "make one page of what a run's folder holds", report_command},
    Command{"doctor", "say what this machine can do, and what stands in a job's way",
            doctor_command},
    Command{"bench", "time collectives, or training, on this machine", bench_command},
};

int help() {
  std::string text =
      "lockstep: distributed training on libtorch\n\n"
      "  lockstep train fashion-mnist --workers 2\n"
      "  lockstep train job.toml --set optimizer.lr=1e-4\n"
      "  lockstep run --nproc-per-node 2 ./my_program\n\n"
      "commands:\n";
  for (const Command& command : kCommands)
    text += fmt::format("  {:9}{}\n", command.name, command.meaning);
  print(text + "\nlockstep COMMAND --help explains a command; lockstep --version says which.\n");
  return 0;
}

int dispatch(std::vector<std::string> words, const Start& start) {
  if (words.empty() || words[0] == "help" || words[0] == "--help" || words[0] == "-h") {
    if (words.size() < 2) return help();
    words = {words[1], "--help"};
  }
  if (words[0] == "--version") {
    print("lockstep " LOCKSTEP_VERSION "\n");
    return 0;
  }
  std::vector<std::string> names;
  for (const Command& command : kCommands) {
    names.emplace_back(command.name);
    if (words[0] == command.name) return command.run({words.begin() + 1, words.end()}, start);
  }
  const std::string near = nearest(words[0], names);
  throw ConfigError("unknown command " + words[0],
                    near.empty() ? "lockstep help lists them" : "did you mean " + near + "?");
}

// Descriptors 0 to 2 must be taken: a pipe of ours under one of these numbers would mix with
// standard output.
void open_standard_streams() {
  for (int fd = 0; fd <= 2; ++fd)
    if (::fcntl(fd, F_GETFD) < 0) [[maybe_unused]]
      const int opened = ::open("/dev/null", O_RDWR);
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  using namespace lockstep;
  const Start start{monotonic_seconds(), static_cast<double>(std::time(nullptr))};
  open_standard_streams();
  ::signal(SIGPIPE, SIG_IGN);  // a reader that went away must not take the agent along
  ::signal(SIGXFSZ, SIG_IGN);  // nor a file that has reached its limit: both are errors to tell
  const auto failed = [](const std::exception& error, int code) {
    print_error(fmt::format("lockstep: {}\n", error.what()));
    // Who ended the job does not want to wait for a reader that takes nothing.
    console().flush(code > 128 ? Deadline::after(std::chrono::seconds(1)) : Deadline::never());
    return code;
  };
  try {
    const int code = dispatch({argv + 1, argv + argc}, start);
    console().flush(Deadline::never());
    return code;
  } catch (const ConfigError& error) {
    return failed(error, kExitBadInput);
  } catch (const Preempted& error) {
    return failed(error, kExitPreempted);
  } catch (const Interrupted& error) {
    return failed(error, 128 + error.signal());
  } catch (const std::exception& error) {
    return failed(error, kExitFailedRun);
  }
}
