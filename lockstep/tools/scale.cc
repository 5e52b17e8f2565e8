// lockstep scale, status, stop: what is asked of a running job. lockstep key: a key for one to
// come.
#include <fmt/format.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>

#include "lockstep/cluster/control_file.h"
#include "lockstep/cluster/job_commands.h"
#include "lockstep/collective/process_state.h"
#include "lockstep/tools/commands.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr auto kAnswer = std::chrono::seconds(10);     // an agent's, when asked
constexpr auto kGlance = std::chrono::seconds(1);      // the same, in a list
constexpr auto kLook = std::chrono::milliseconds(20);  // between two questions

fs::path base() {
  const char* folder = std::getenv("XDG_RUNTIME_DIR");
  return job_base(folder != nullptr ? folder : "");
}

// Those of this user's that a list can find: jobs without a folder of their own, and runs/ here.
std::vector<fs::path> known_jobs() {
  std::vector<fs::path> jobs = job_folders(base());
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator("runs", error))
    if (std::error_code ignored; fs::exists(entry.path() / kControlFile, ignored))
      jobs.push_back(entry.path());
  return jobs;
}

std::string name_of(const fs::path& folder) {
  return folder.parent_path() == base() ? folder.filename().string() : folder.string();
}

std::string workers(int count) { return fmt::format("{} worker{}", count, count == 1 ? "" : "s"); }

std::string describe(const JobStatus& status) {
  std::string text = fmt::format("{}, generation {}", workers(status.workers), status.generation);
  if (status.step) text += fmt::format(", step {}", *status.step);
  if (status.wanted != status.workers) text += fmt::format(", aiming at {}", status.wanted);
  if (status.least != status.most) text += fmt::format(" ({} to {})", status.least, status.most);
  return status.reason.empty() ? text : text + ": " + status.reason;
}

// A job, and the way to its agent.
class Job {
 public:
  explicit Job(const std::string& name);

  // Asks through `ask`, and says why there is no answer.
  template <typename Ask>
  auto ask(Ask ask, Clock::duration patience) {
    try {
      return ask(client_, Deadline::after(patience));
    } catch (const CommError& error) {
      const ProcessState state = process_state(entry_.pid, entry_.process_start);
      if (state == ProcessState::dead) throw Error(fmt::format("the job {} has ended", name_));
      throw Error(fmt::format("the job {} does not answer: its agent (pid {}) is {}; {}", name_,
                              entry_.pid, lockstep::name_of(state), error.what()));
    }
  }
  void wait_for_end(const Deadline& deadline) const;
  const std::string& name() const { return name_; }
  int pid() const { return entry_.pid; }

 private:
  static fs::path folder_of(const std::string& name);
  static ControlEntry entry_in(const fs::path& folder, const std::string& name);

  std::string name_;
  ControlEntry entry_;
  ControlClient client_;
};

fs::path Job::folder_of(const std::string& name) {
  std::error_code error;
  if (name.find('/') == std::string::npos && !name.starts_with('.') &&
      fs::exists(base() / name / kControlFile, error))
    return base() / name;
  return name;
}

ControlEntry Job::entry_in(const fs::path& folder, const std::string& name) {
  std::error_code error;
  if (!fs::exists(folder / kControlFile, error) && error != std::errc::permission_denied) {
    if (fs::exists(folder / "job.toml", error))
      throw ConfigError(fmt::format("no job is running in {}", name),
                        "it has ended; lockstep train --resume goes on with one that was ended");
    throw ConfigError(fmt::format("there is no job {}", name),
                      "the folder of a run, or a name that lockstep scale lists");
  }
  ControlEntry entry = read_control_entry(folder);
  if (entry.host != host_name())
    throw ConfigError(fmt::format("the job {} runs on {}", name, entry.host),
                      "run this command there");
  if (process_state(entry.pid, entry.process_start) == ProcessState::dead)
    throw ConfigError(
        fmt::format("the job {} has ended: its agent (pid {}) was killed", name, entry.pid));
  return entry;
}

Job::Job(const std::string& name)
    : name_(name), entry_(entry_in(folder_of(name), name)), client_(target_of(entry_)) {}

void Job::wait_for_end(const Deadline& deadline) const {
  const UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, entry_.pid, 0)));
  pollfd watched{process.get(), POLLIN, 0};
  while (process_state(entry_.pid, entry_.process_start) != ProcessState::dead) {
    if (!process || deadline.expired())
      throw Error(
          fmt::format("the job {} was asked to stop and still runs (pid {})", name_, entry_.pid));
    ::poll(&watched, 1, poll_timeout_ms(deadline));
  }
}

void list_jobs() {
  const std::vector<fs::path> jobs = known_jobs();
  for (const fs::path& folder : jobs) {
    std::string text;
    try {
      Job job(name_of(folder));
      text = describe(job.ask(ask_status, kGlance));
    } catch (const Error& error) {
      text = error.what();
    }
    print(fmt::format("{}  {}\n", name_of(folder), text));
  }
  if (jobs.empty()) print("no job was found; those of lockstep train are looked for in ./runs\n");
}

void scale(const std::string& name, int count, Clock::duration patience) {
  const Deadline deadline = Deadline::after(patience);
  Job job(name);
  const JobStatus before = job.ask(ask_status, kAnswer);
  JobStatus now = job.ask(
      [&](ControlClient& client, const Deadline& until) { return ask_scale(client, count, until); },
      kAnswer);
  if (before.workers == count && before.wanted == count)
    return print(fmt::format("{} already: generation {}\n", workers(count), before.generation));
  // A program of one's own may not tell its steps: then a generation is all there is to see.
  while (now.workers != count || (now.step && !now.first_step)) {
    if (deadline.expired())
      throw Error(fmt::format("the job {} still has {}", name, describe(now)));
    std::this_thread::sleep_for(kLook);
    now = job.ask(ask_status, kAnswer);
  }
  print(fmt::format("{} from generation {} on{}\n", workers(count), now.generation,
                    now.first_step ? fmt::format(", step {}", *now.first_step) : ""));
}

struct JobFlags {
  std::string job;
  int timeout = 0;
};

void add_flags(CLI::App& app, JobFlags& flags, int timeout, const char* waits_for) {
  flags.timeout = timeout;
  app.option_defaults()->take_last();
  app.add_option("JOB", flags.job, "the folder of a run, or a name that lockstep scale lists");
  if (timeout > 0)
    app.add_option("--timeout", flags.timeout, fmt::format("seconds to wait for {}", waits_for))
        ->capture_default_str()
        ->check(CLI::Range(0, 1'000'000));
}

void need_job(const JobFlags& flags) {
  if (flags.job.empty()) throw ConfigError("no job given", "lockstep scale lists those it finds");
}

}  // namespace

int scale_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app(
      "Changes how many workers a running job has, within its --workers MIN:MAX, and waits until\n"
      "they are at work. Without a JOB: lists the jobs.",
      "lockstep scale");
  JobFlags flags;
  std::optional<int> count;
  add_flags(app, flags, 120, "the workers");
  app.add_option("N", count, "workers");
  if (!parse_arguments(app, arguments)) return 0;
  if (flags.job.empty()) {
    list_jobs();
    return 0;
  }
  if (!count) throw ConfigError("no number of workers given", "lockstep scale JOB N");
  if (*count < 1) throw ConfigError(fmt::format("{} workers: at least 1", *count));
  scale(flags.job, *count, std::chrono::seconds(flags.timeout));
  return 0;
}

int status_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app("Says what a running job does.", "lockstep status");
  JobFlags flags;
  add_flags(app, flags, 0, "");
  if (!parse_arguments(app, arguments)) return 0;
  need_job(flags);
  print(describe(Job(flags.job).ask(ask_status, kAnswer)) + "\n");
  return 0;
}

int stop_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app(
      "Has a running job finish its step, save and end, as SIGTERM does, and waits for its end.",
      "lockstep stop");
  JobFlags flags;
  add_flags(app, flags, 120, "its end");
  if (!parse_arguments(app, arguments)) return 0;
  need_job(flags);
  const Deadline deadline = Deadline::after(std::chrono::seconds(flags.timeout));
  Job job(flags.job);
  job.ask(ask_stop, kAnswer);
  job.wait_for_end(deadline);
  print(fmt::format("the job {} (pid {}) has ended\n", job.name(), job.pid()));
  return 0;
}

int key_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app(
      "Writes a new key for --key-file. Who can read the file can control the jobs started with "
      "it.",
      "lockstep key");
  std::string file;
  app.add_option("FILE", file, "written with mode 0600; must not exist");
  if (!parse_arguments(app, arguments)) return 0;
  if (file.empty()) throw ConfigError("no file given", "lockstep key FILE");
  write_control_key(file, make_control_key());
  return 0;
}

}  // namespace lockstep
