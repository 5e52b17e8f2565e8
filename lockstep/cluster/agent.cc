#include "lockstep/cluster/agent.h"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <deque>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/cluster/console.h"
#include "lockstep/cluster/line_splitter.h"
#include "lockstep/cluster/spawn.h"
#include "lockstep/cluster/trace.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/event.h"

namespace lockstep {
namespace {

constexpr std::size_t kLastWords = 10;
constexpr std::size_t kReadBytes = std::size_t{64} << 10;
constexpr int kPipeBytes = 1 << 20;  // what a pipe can hold at most
constexpr pollfd kNone{-1, 0, 0};

enum class Source : std::uint32_t { output, error, events, exit, signal, timer };

struct Worker {
  Spawned process;
  LineSplitter output_lines, error_lines;
  EventReader events;
  std::deque<std::string> last_words;
  bool blames_others = false;  // it reported that its group failed
  bool running = false;
};

struct Death {
  WorkerFailure failure;
  // Lower is more likely the cause: a signal; an exit code; an abort, which is also how an uncaught
  // CommError ends; a worker that said itself that another one failed.
  int suspicion = 0;
};

class Agent {
 public:
  explicit Agent(const AgentOptions& options) : options_(options) {}
  AgentResult run();

 private:
  void start();
  void loop();
  void wait();
  void take(Source source, int rank);
  void watch(int fd, Source source, int rank);
  Environment all_environment() const;
  Environment worker_environment(int rank) const;

  bool read_some(int rank, Source source);
  void drain(int rank);
  void take_bytes(int rank, Source source, std::string_view bytes);
  void take_events(int rank, std::string_view bytes);
  void take_line(int rank, bool error, std::string_view line);
  void take_exit(int rank);
  void take_cause();
  void take_signal();

  void end(const std::string& reason, bool at_once);
  void signal_workers(int number);
  void finish();

  const AgentOptions& options_;
  std::string trace_;  // LOCKSTEP_TRACE
  AgentResult result_;
  std::vector<Worker> workers_;
  int running_ = 0;
  std::vector<Death> deaths_;  // since the last look
  std::vector<int> children_before_;
  std::uint64_t memory_kills_before_ = 0;
  UniqueFd epoll_;  // exits, signals, ticks
  UniqueFd pipes_;  // an epoll too: what the workers write, which can be left waiting
  UniqueFd signals_, timer_;
  bool ending_ = false;
  bool muted_ = false;  // a callback has thrown: none is called any more
  Deadline kill_at_ = Deadline::never();
};

// Blocks the signals that the agent reads from a descriptor and adopts orphans; undone at the end.
class ProcessSettings {
 public:
  ProcessSettings() {
    ::sigemptyset(&signals_);
    for (int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT}) ::sigaddset(&signals_, number);
    ::pthread_sigmask(SIG_BLOCK, &signals_, &before_);
    ::prctl(PR_GET_CHILD_SUBREAPER, &was_subreaper_);
    ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  }
  ~ProcessSettings() {
    ::prctl(PR_SET_CHILD_SUBREAPER, was_subreaper_);
    ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  const sigset_t& signals() const { return signals_; }

 private:
  sigset_t signals_, before_;
  int was_subreaper_ = 0;
};

UniqueFd checked(int fd, const char* what) {
  if (fd < 0) throw Error(fmt::format("cannot watch the workers: {}: {}", what, errno_text(errno)));
  return UniqueFd(fd);
}

AgentResult Agent::run() {
  LOCKSTEP_CHECK(options_.workers > 0 && !options_.command.empty());
  const ProcessSettings settings;
  children_before_ = child_processes();
  memory_kills_before_ = out_of_memory_kills();
  epoll_ = checked(::epoll_create1(EPOLL_CLOEXEC), "epoll");
  pipes_ = checked(::epoll_create1(EPOLL_CLOEXEC), "epoll");
  signals_ = checked(::signalfd(-1, &settings.signals(), SFD_CLOEXEC | SFD_NONBLOCK), "signalfd");
  watch(signals_.get(), Source::signal, 0);

  std::exception_ptr thrown;
  bool done = false;
  while (!done) {
    try {
      if (workers_.empty() && !thrown) start();
      loop();
      finish();
      done = true;
    } catch (const std::exception& error) {
      const bool again = thrown != nullptr;  // ending them failed too
      if (!again) thrown = std::current_exception();
      muted_ = true;
      end(error.what(), again);
      done = again && !kill_children_except(children_before_);
    }
  }
  if (thrown) std::rethrow_exception(thrown);
  return result_;
}

void Agent::watch(int fd, Source source, int rank) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = std::uint64_t(source) << 32 | std::uint32_t(rank);
  const bool pipe = source == Source::output || source == Source::error || source == Source::events;
  if (::epoll_ctl((pipe ? pipes_ : epoll_).get(), EPOLL_CTL_ADD, fd, &event) != 0)
    throw Error("cannot watch the workers: " + errno_text(errno));
}

Environment Agent::all_environment() const {
  Environment environment = process_environment();
  for (const auto& [name, value] : options_.environment) environment[name] = value;
  return environment;
}

Environment Agent::worker_environment(int rank) const {
  Environment environment = all_environment();
  if (!trace_.empty()) environment["LOCKSTEP_TRACE"] = trace_;
  const std::string size = std::to_string(options_.workers), number = std::to_string(rank);
  for (const char* name : {"RANK", "LOCAL_RANK", "ROLE_RANK"}) environment[name] = number;
  for (const char* name : {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"})
    environment[name] = size;
  environment["GROUP_RANK"] = "0";
  environment["GROUP_WORLD_SIZE"] = "1";
  environment["MASTER_ADDR"] = options_.master_addr;
  environment["MASTER_PORT"] = std::to_string(options_.master_port);
  environment["TORCHELASTIC_RESTART_COUNT"] = "0";
  environment["TORCHELASTIC_MAX_RESTARTS"] = "0";
  environment.emplace("ROLE_NAME", "default");
  if (!options_.environment.contains("TORCHELASTIC_RUN_ID"))
    environment["TORCHELASTIC_RUN_ID"] = fmt::format("lockstep-{}", ::getpid());
  if (options_.threads)
    environment["OMP_NUM_THREADS"] = std::to_string(*options_.threads);
  else if (options_.workers > 1)
    environment.emplace("OMP_NUM_THREADS", "1");
  // Big blocks stay in the process: given back to the kernel, every step would fault them in again.
  environment.emplace("GLIBC_TUNABLES",
                      "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776");
  if (options_.segment) {
    environment["LOCKSTEP_LAUNCHER"] = "lockstep";
    environment["LOCKSTEP_GENERATION"] = "0";
    environment["LOCKSTEP_SEGMENT_FD"] = std::to_string(options_.segment->fd());
  } else {
    for (const char* name : {"LOCKSTEP_LAUNCHER", "LOCKSTEP_GENERATION", "LOCKSTEP_SEGMENT_FD"})
      environment.erase(name);
  }
  return environment;
}

void Agent::start() {
  if (const std::string trace = all_environment()["LOCKSTEP_TRACE"];
      options_.segment && !trace.empty()) {
    prepare_trace(trace, options_.workers);
    trace_ = std::filesystem::absolute(trace);  // a worker may change its folder
  }
  workers_ = std::vector<Worker>(static_cast<std::size_t>(options_.workers));
  for (int rank = 0; rank < options_.workers; ++rank) {
    Worker& worker = workers_[static_cast<std::size_t>(rank)];
    worker.process = spawn(options_.command, worker_environment(rank),
                           options_.segment ? options_.segment->fd() : -1);
    worker.running = true;
    ++running_;
    watch(worker.process.pidfd.get(), Source::exit, rank);
    watch(worker.process.output.get(), Source::output, rank);
    watch(worker.process.error.get(), Source::error, rank);
    watch(worker.process.events.get(), Source::events, rank);
  }
  for (const Worker& worker : workers_) {
    const int error = wait_for_exec(worker.process);
    if (error == 0) continue;
    const std::filesystem::path program = options_.command[0];
    std::error_code ignored;
    const bool here =
        error == ENOENT && !program.has_parent_path() && std::filesystem::exists(program, ignored);
    throw ConfigError(fmt::format("could not start {}: {}", program.string(), errno_text(error)),
                      here ? fmt::format("did you mean ./{}?", program.string()) : "");
  }
  if (options_.on_tick) {
    timer_ = checked(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), "timerfd");
    const timespec tenth{0, 100'000'000};
    const itimerspec every{tenth, tenth};
    ::timerfd_settime(timer_.get(), 0, &every, nullptr);
    watch(timer_.get(), Source::timer, 0);
  }
}

void Agent::loop() {
  std::array<epoll_event, 64> ready;
  while (running_ > 0) {
    wait();
    for (const UniqueFd* from : {&epoll_, &pipes_}) {
      const int count = ::epoll_wait(from->get(), ready.data(), int(ready.size()), 0);
      if (count < 0 && errno != EINTR)
        throw Error("cannot watch the workers: " + errno_text(errno));
      for (int i = 0; i < count; ++i) {
        if (from == &pipes_ && options_.console != nullptr && options_.console->full()) break;
        const std::uint64_t tag = ready[std::size_t(i)].data.u64;
        take(static_cast<Source>(tag >> 32), static_cast<int>(tag & 0xffffffff));
      }
    }
    if (!deaths_.empty() && !ending_) take_cause();
    if (kill_at_.expired()) {
      signal_workers(SIGKILL);
      kill_at_ = Deadline::never();
    }
  }
}

// A reader of ours that takes nothing may hold up what the workers write, and nothing else.
void Agent::wait() {
  Console* const console = options_.console;
  if (console != nullptr) console->pass_on();
  const bool full = console != nullptr && console->full();
  const auto streams = console != nullptr ? console->wanted() : std::array{kNone, kNone};
  std::array<pollfd, 4> watched = {pollfd{epoll_.get(), POLLIN, 0},
                                   full ? kNone : pollfd{pipes_.get(), POLLIN, 0}, streams[0],
                                   streams[1]};
  if (::poll(watched.data(), watched.size(), poll_timeout_ms(kill_at_)) < 0 && errno != EINTR)
    throw Error("cannot watch the workers: " + errno_text(errno));
}

void Agent::take(Source source, int rank) {
  if (source == Source::exit) return take_exit(rank);
  if (source == Source::signal) return take_signal();
  if (source != Source::timer) return void(read_some(rank, source));
  std::uint64_t ticks;
  if (::read(timer_.get(), &ticks, sizeof ticks) > 0 && !muted_) options_.on_tick();
}

// The likeliest cause among the deaths, those included that nobody has told of yet.
void Agent::take_cause() {
  for (int rank = 0; rank < options_.workers; ++rank) take_exit(rank);
  const auto likeliest = std::min_element(
      deaths_.begin(), deaths_.end(), [](auto& a, auto& b) { return a.suspicion < b.suspicion; });
  result_.failure = likeliest->failure;
  end(fmt::format("rank {} (pid {}): {}", result_.failure->rank, result_.failure->pid,
                  result_.failure->cause),
      false);
}

// One read; false at the end of the stream or when nothing is there.
bool Agent::read_some(int rank, Source source) {
  Spawned& process = workers_[std::size_t(rank)].process;
  UniqueFd& fd = source == Source::output  ? process.output
                 : source == Source::error ? process.error
                                           : process.events;
  if (!fd) return false;
  char bytes[kReadBytes];
  const ssize_t count = ::read(fd.get(), bytes, sizeof bytes);
  if (count < 0) return errno == EINTR;
  if (count == 0) {
    fd = UniqueFd();  // which also ends watching it
    take_bytes(rank, source, {});
    return false;
  }
  take_bytes(rank, source, {bytes, std::size_t(count)});
  return true;
}

// What an ended worker had written is in its pipes; a child of it may hold them open and write on.
void Agent::drain(int rank) {
  for (Source source : {Source::output, Source::error, Source::events})
    for (int reads = 2 * kPipeBytes / int(kReadBytes); reads > 0 && read_some(rank, source);)
      --reads;
}

// No bytes: the stream has ended.
void Agent::take_bytes(int rank, Source source, std::string_view bytes) {
  Worker& worker = workers_[std::size_t(rank)];
  if (source == Source::events) {
    if (!muted_) take_events(rank, bytes);
    return;
  }
  const bool error = source == Source::error;
  const auto on_line = [&](std::string_view line) { take_line(rank, error, line); };
  LineSplitter& lines = error ? worker.error_lines : worker.output_lines;
  if (bytes.empty())
    lines.finish(on_line);
  else
    lines.feed(bytes, on_line);
}

void Agent::take_events(int rank, std::string_view bytes) {
  Worker& worker = workers_[std::size_t(rank)];
  const auto broken = [&](const std::exception& error) {
    return Error(
        fmt::format("rank {} (pid {}): broken event: {}", rank, worker.process.pid, error.what()));
  };
  std::vector<nlohmann::json> events;
  try {
    events = worker.events.feed(as_byte_span(bytes));
  } catch (const Error& error) {
    throw broken(error);
  }
  for (const nlohmann::json& event : events) {
    try {
      if (event["event"] == "error" && event.value("kind", "") == "comm")
        worker.blames_others = true;
      if (options_.on_event && !muted_) options_.on_event(rank, event);
    } catch (const nlohmann::json::exception& error) {  // a member is missing or of a wrong type
      throw broken(error);
    }
  }
}

void Agent::take_line(int rank, bool error, std::string_view line) {
  std::deque<std::string>& last_words = workers_[std::size_t(rank)].last_words;
  if (error) {
    last_words.emplace_back(line);
    if (last_words.size() > kLastWords) last_words.pop_front();
  }
  if (options_.on_line && !muted_) options_.on_line(rank, error, line);
}

void Agent::take_exit(int rank) {
  Worker& worker = workers_[std::size_t(rank)];
  int status = 0;
  if (!worker.running || ::waitpid(worker.process.pid, &status, WNOHANG) <= 0) return;
  worker.running = false;
  --running_;
  worker.process.pidfd = UniqueFd();
  Death death;
  const bool failed = status != 0;
  const int number = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  if (number != 0) {
    death.failure.cause = fmt::format("killed by signal {} ({})", number, signal_name(number));
    if (number == SIGKILL && out_of_memory_kills() > memory_kills_before_)
      death.failure.cause += ", perhaps out of memory: the kernel ended a process of this group";
  } else {
    death.failure.cause = fmt::format("exited with code {}", WEXITSTATUS(status));
  }
  drain(rank);
  if (!failed || ending_) return;
  death.failure.rank = rank;
  death.failure.pid = worker.process.pid;
  death.failure.last_words.assign(worker.last_words.begin(), worker.last_words.end());
  death.suspicion = worker.blames_others ? 3 : number == SIGABRT ? 2 : number == 0 ? 1 : 0;
  deaths_.push_back(std::move(death));
}

void Agent::take_signal() {
  signalfd_siginfo info;
  while (::read(signals_.get(), &info, sizeof info) == sizeof info) {
    const int number = static_cast<int>(info.ssi_signo);
    const bool again = result_.signal != 0;
    if (!again) result_.signal = number;
    end(fmt::format("the job was ended by {}", signal_name(number)), again);
  }
}

// Once: tells the workers' groups and asks the processes to go. at_once: without asking.
void Agent::end(const std::string& reason, bool at_once) {
  if (at_once) {
    signal_workers(SIGKILL);
  } else if (!ending_) {
    if (options_.segment) options_.segment->abort(reason);
    signal_workers(SIGTERM);
    signal_workers(SIGCONT);  // one that is stopped hears of it only then
    kill_at_ = Deadline::after(options_.grace);
  }
  ending_ = true;
}

void Agent::signal_workers(int number) {
  for (const Worker& worker : workers_)
    if (worker.running) ::kill(-worker.process.pid, number);
}

void Agent::finish() {
  const bool gone = kill_children_except(children_before_);
  for (int rank = 0; rank < int(workers_.size()); ++rank) {
    drain(rank);
    for (Source source : {Source::output, Source::error}) take_bytes(rank, source, {});
  }
  if (!trace_.empty()) write_trace(*options_.segment, trace_);
  if (!gone) throw Error("a process that a worker started could not be ended");
  result_.ok = !ending_;
}

}  // namespace

AgentResult run_agent(const AgentOptions& options) { return Agent(options).run(); }

std::string describe(const WorkerFailure& failure) {
  std::string text = fmt::format("rank {} (pid {}): {}", failure.rank, failure.pid, failure.cause);
  for (const std::string& line : failure.last_words) text += "\n  " + line;
  return text;
}

}  // namespace lockstep
