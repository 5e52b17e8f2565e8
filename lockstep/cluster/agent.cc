#include "lockstep/cluster/agent.h"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <deque>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/cluster/console.h"
#include "lockstep/cluster/spawn.h"
#include "lockstep/cluster/trace.h"
#include "lockstep/cluster/worker_process.h"
#include "lockstep/cluster/zygote.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

constexpr pollfd kNone{-1, 0, 0};
constexpr int kZygoteId = 0;     // among the workers' ids
constexpr int kMostZygotes = 3;  // in a row that were killed before they had started a worker
constexpr std::size_t kMostAsked = 16;  // requests that a zygote has not answered yet

enum class Source : std::uint32_t { output, error, events, exit, signal, timer, zygote };

struct Worker {
  WorkerProcess process;
  int rank = 0;
  bool running = false;
};

// A worker that a zygote is to fork.
struct Request {
  int id = 0;
  Streams streams;  // its ends
  bool asked = false;
};

struct Death {
  WorkerFailure failure;
  int suspicion = 0;  // see Ending
};

class Agent {
 public:
  explicit Agent(const AgentOptions& options) : options_(options) {}
  AgentResult run();

 private:
  void start();
  Environment common_environment() const;
  Environment place_environment(int rank) const;
  void start_zygote();
  void start_worker(int rank);
  Worker& add_worker(int id, int rank, Streams streams);
  void check_exec(const WorkerProcess& process) const;
  void ask_zygote();
  void take_answers();
  void zygote_ended(const Ending& ending);

  void loop();
  void wait();
  void take(Source source, int id);
  void watch(int fd, Source source, int id);
  void read_some(Worker& worker, Stream stream);
  void take_exit(int id);
  void take_death(const Worker& worker, const Ending& ending);
  void take_cause();
  void take_signal();

  WorkerProcess::OnLine on_line(const Worker& worker);
  WorkerProcess::OnEvent on_event(const Worker& worker);

  void end(const std::string& reason, bool at_once);
  void signal_workers(int number);
  void finish();

  const AgentOptions& options_;
  std::string trace_;  // LOCKSTEP_TRACE
  AgentResult result_;
  std::map<int, Worker> workers_;
  int last_id_ = kZygoteId;
  int running_ = 0;  // or to be forked; the zygote aside
  std::optional<Zygote> zygote_;
  std::deque<Request> requests_;  // oldest first
  int zygotes_lost_ = 0;          // since the last that started a worker
  std::vector<Death> deaths_;     // since the last look
  std::vector<int> children_before_;
  UniqueFd epoll_;  // exits, signals, ticks
  UniqueFd pipes_;  // an epoll too: what the workers write, which can be left waiting
  UniqueFd signals_, timer_;
  bool started_ = false;
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
  epoll_ = checked(::epoll_create1(EPOLL_CLOEXEC), "epoll");
  pipes_ = checked(::epoll_create1(EPOLL_CLOEXEC), "epoll");
  signals_ = checked(::signalfd(-1, &settings.signals(), SFD_CLOEXEC | SFD_NONBLOCK), "signalfd");
  watch(signals_.get(), Source::signal, 0);

  std::exception_ptr thrown;
  bool done = false;
  while (!done) {
    try {
      if (!std::exchange(started_, true)) start();
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

void Agent::watch(int fd, Source source, int id) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = std::uint64_t(source) << 32 | std::uint32_t(id);
  const bool pipe = source <= Source::events;
  if (::epoll_ctl((pipe ? pipes_ : epoll_).get(), EPOLL_CTL_ADD, fd, &event) != 0)
    throw Error("cannot watch the workers: " + errno_text(errno));
}

// What all workers have alike, a zygote too.
Environment Agent::common_environment() const {
  Environment environment = process_environment();
  for (const auto& [name, value] : options_.environment) environment[name] = value;
  if (!trace_.empty()) environment["LOCKSTEP_TRACE"] = trace_;
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
  for (const char* name : {"LOCKSTEP_LAUNCHER", "LOCKSTEP_GENERATION", "LOCKSTEP_SEGMENT_FD"})
    environment.erase(name);
  return environment;
}

Environment Agent::place_environment(int rank) const {
  Environment environment;
  const std::string size = std::to_string(options_.workers), number = std::to_string(rank);
  for (const char* name : {"RANK", "LOCAL_RANK", "ROLE_RANK"}) environment[name] = number;
  for (const char* name : {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"})
    environment[name] = size;
  if (!options_.segment) return environment;
  environment["LOCKSTEP_LAUNCHER"] = "lockstep";
  environment["LOCKSTEP_GENERATION"] = "0";
  environment["LOCKSTEP_SEGMENT_FD"] = std::to_string(options_.segment->fd());
  return environment;
}

void Agent::start() {
  if (const std::string trace = common_environment()["LOCKSTEP_TRACE"];
      options_.segment && !trace.empty()) {
    prepare_trace(trace, options_.workers);
    trace_ = std::filesystem::absolute(trace);  // a worker may change its folder
  }
  if (options_.zygote) start_zygote();
  for (int rank = 0; rank < options_.workers; ++rank) start_worker(rank);
  for (const auto& [id, worker] : workers_)
    if (worker.process.pid() != 0) check_exec(worker.process);
  if (options_.on_tick) {
    timer_ = checked(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), "timerfd");
    const timespec tenth{0, 100'000'000};
    const itimerspec every{tenth, tenth};
    ::timerfd_settime(timer_.get(), 0, &every, nullptr);
    watch(timer_.get(), Source::timer, 0);
  }
}

void Agent::start_zygote() {
  StreamEnds streams = make_streams();
  zygote_.emplace();
  Worker& worker = add_worker(kZygoteId, 0, std::move(streams.read));
  worker.process.started(zygote_->start(options_.command, common_environment(), streams.write));
  watch(worker.process.process().pidfd.get(), Source::exit, kZygoteId);
  watch(zygote_->socket(), Source::zygote, kZygoteId);
}

void Agent::start_worker(int rank) {
  const int id = ++last_id_;
  StreamEnds streams = make_streams();
  Worker& worker = add_worker(id, rank, std::move(streams.read));
  if (zygote_) {
    requests_.push_back({.id = id, .streams = std::move(streams.write)});
    ask_zygote();
  } else {
    Environment environment = common_environment();
    environment.merge(place_environment(rank));
    worker.process.started(spawn(options_.command, std::move(environment), streams.write,
                                 options_.segment ? options_.segment->fd() : -1));
    watch(worker.process.process().pidfd.get(), Source::exit, id);
  }
  ++running_;
}

Worker& Agent::add_worker(int id, int rank, Streams streams) {
  Worker& worker = workers_[id];
  worker = Worker{.process = WorkerProcess(std::move(streams)), .rank = rank, .running = true};
  worker.process.rank = rank;
  watch(worker.process.stream(Stream::output).get(), Source::output, id);
  watch(worker.process.stream(Stream::error).get(), Source::error, id);
  watch(worker.process.stream(Stream::events).get(), Source::events, id);
  return worker;
}

void Agent::check_exec(const WorkerProcess& process) const {
  const int error = wait_for_exec(process.process());
  if (error == 0) return;
  const std::filesystem::path program = options_.command[0];
  std::error_code ignored;
  const bool here =
      error == ENOENT && !program.has_parent_path() && std::filesystem::exists(program, ignored);
  throw ConfigError(fmt::format("could not start {}: {}", program.string(), errno_text(error)),
                    here ? fmt::format("did you mean ./{}?", program.string()) : "");
}

// A request that cannot be sent waits: for the answers to those before it, or for the next zygote.
void Agent::ask_zygote() {
  std::size_t asked = 0;
  for (Request& request : requests_) {
    if (++asked > kMostAsked) return;
    if (request.asked) continue;
    if (zygote_->request(place_environment(workers_.at(request.id).rank), request.streams,
                         options_.segment->fd()) != 0)
      return;
    request.asked = true;
  }
}

void Agent::take_answers() {
  while (const std::optional<int> pid = zygote_->answer()) {
    if (requests_.empty() || !requests_.front().asked)
      throw Error("the zygote has started a worker that nobody asked for");
    const int id = requests_.front().id;
    requests_.pop_front();
    if (*pid < 0) throw Error("cannot start a worker: " + errno_text(-*pid));
    zygotes_lost_ = 0;
    workers_.at(id).process.started(adopt(*pid));
    watch(workers_.at(id).process.process().pidfd.get(), Source::exit, id);
    if (ending_) ::kill(-*pid, SIGKILL);
  }
  ask_zygote();
}

// Workers that it has forked are the agent's own, and go on. One that ends before it has forked any
// has failed at what the first worker would have failed at.
void Agent::zygote_ended(const Ending& ending) {
  pollfd more{zygote_->socket(), POLLIN, 0};
  while (::poll(&more, 1, 1000) > 0 && (more.revents & POLLIN) != 0) {
    if (zygote_->ended()) break;
    take_answers();
  }
  // One that was forked and not told of must not sit where another will.
  std::vector<int> known = children_before_;
  for (const auto& [id, worker] : workers_) known.push_back(worker.process.pid());
  kill_children_except(known);
  for (Request& request : requests_) request.asked = false;
  const Worker& worker = workers_.at(kZygoteId);
  if (!ending_ && (ending.signal == 0 || ++zygotes_lost_ > kMostZygotes))
    take_death(worker, ending);
  zygote_.reset();
  if (ending_ || !deaths_.empty()) {
    running_ -= int(requests_.size());
    for (const Request& request : requests_) workers_.at(request.id).running = false;
    requests_.clear();
  } else {
    start_zygote();
    ask_zygote();
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

void Agent::take(Source source, int id) {
  if (source == Source::exit) return take_exit(id);
  if (source == Source::signal) return take_signal();
  if (source == Source::zygote) return zygote_ ? take_answers() : void();
  if (source != Source::timer) return read_some(workers_.at(id), static_cast<Stream>(source));
  std::uint64_t ticks;
  if (::read(timer_.get(), &ticks, sizeof ticks) > 0 && !muted_) options_.on_tick();
}

// The likeliest cause among the deaths, those included that nobody has told of yet.
void Agent::take_cause() {
  for (int id = kZygoteId; id <= last_id_; ++id) take_exit(id);
  const auto likeliest = std::min_element(
      deaths_.begin(), deaths_.end(), [](auto& a, auto& b) { return a.suspicion < b.suspicion; });
  result_.failure = likeliest->failure;
  end(fmt::format("rank {} (pid {}): {}", result_.failure->rank, result_.failure->pid,
                  result_.failure->cause),
      false);
}

WorkerProcess::OnLine Agent::on_line(const Worker& worker) {
  return [&](bool error, std::string_view line) {
    if (options_.on_line && !muted_) options_.on_line(worker.rank, error, line);
  };
}

WorkerProcess::OnEvent Agent::on_event(const Worker& worker) {
  if (muted_) return {};
  return [&](const nlohmann::json& event) {
    if (options_.on_event) options_.on_event(worker.rank, event);
  };
}

void Agent::read_some(Worker& worker, Stream stream) {
  worker.process.read_some(stream, on_line(worker), on_event(worker));
}

void Agent::take_exit(int id) {
  const auto found = workers_.find(id);
  if (found == workers_.end() || !found->second.running) return;
  Worker& worker = found->second;
  const std::optional<Ending> ending = worker.process.take_exit(on_line(worker), on_event(worker));
  if (!ending) return;
  worker.running = false;
  if (id == kZygoteId) return zygote_ended(*ending);
  --running_;
  if (!ending_ && (ending->signal != 0 || ending->code != 0)) take_death(worker, *ending);
}

void Agent::take_death(const Worker& worker, const Ending& ending) {
  const std::deque<std::string>& words = worker.process.last_words();
  deaths_.push_back({{.rank = worker.rank,
                      .pid = worker.process.pid(),
                      .cause = ending.cause,
                      .last_words = {words.begin(), words.end()}},
                     ending.suspicion});
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
  if (zygote_) ::kill(-workers_.at(kZygoteId).process.pid(), SIGKILL);  // no more workers
}

void Agent::signal_workers(int number) {
  for (const auto& [id, worker] : workers_)
    if (worker.running && worker.process.pid() != 0) ::kill(-worker.process.pid(), number);
}

void Agent::finish() {
  const bool gone = kill_children_except(children_before_);
  for (auto& [id, worker] : workers_) {
    worker.process.drain(on_line(worker), on_event(worker));
    worker.process.finish_lines(on_line(worker));
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
