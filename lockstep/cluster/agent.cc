#include "lockstep/cluster/agent.h"

#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>

#include "lockstep/cluster/agent_machine.h"
#include "lockstep/cluster/console.h"
#include "lockstep/cluster/control.h"
#include "lockstep/cluster/spawn.h"
#include "lockstep/cluster/trace.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

constexpr pollfd kNone{-1, 0, 0};

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

}  // namespace

AgentResult Agent::run() {
  LOCKSTEP_CHECK(options_.workers > 0 && !options_.command.empty());
  const ProcessSettings settings;
  guardian_.emplace();
  for (const TimedKills& kills : options_.kills) kills_.emplace_back(kills);
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

void Agent::start() {
  if (const std::string trace = common_environment()["LOCKSTEP_TRACE"];
      segment_ && !trace.empty()) {
    trace_ = std::filesystem::absolute(trace);  // a worker may change its folder
    if (options_.nodes && options_.nodes->rank > 0)
      trace_ += fmt::format(".node{}", options_.nodes->rank);
    prepare_trace(trace_, segment_->seats());
  }
  if (options_.zygote) start_zygote();
  begin_job();
  if (options_.nodes && options_.nodes->bound_to >= 0)
    watch(options_.nodes->bound_to, Source::bound, 0);
  if (options_.control != nullptr) watch(options_.control->fd(), Source::control, 0);
  timer_ = checked(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), "timerfd");
  const timespec tenth{0, 100'000'000};
  const itimerspec every{tenth, tenth};
  ::timerfd_settime(timer_.get(), 0, &every, nullptr);
  watch(timer_.get(), Source::timer, 0);
}

// With a segment, workers are members, also of a program that knows nothing of generations: it has
// one of them.
void Agent::begin_job() {
  const NodeIntroduction self = introduction();
  const NodeWelcome alike{.workers = options_.workers,
                          .restarts = restarts_,
                          .master_addr = options_.master_addr,
                          .run_id = options_.environment.contains("TORCHELASTIC_RUN_ID")
                                        ? options_.environment.at("TORCHELASTIC_RUN_ID")
                                        : fmt::format("lockstep-{}", ::getpid()),
                          .master_port = options_.master_port};
  if (!segment_) {
    welcome_ = alike;
    for (int rank = 0; rank < options_.workers; ++rank) start_worker(-1, rank);
    for (const auto& [id, worker] : workers_) check_exec(worker.process);
    return;
  }
  if (self.rank > 0) return make_link();
  CoordinatorOptions coordinator{.policy = {.standby = options_.standby,
                                            .max_restarts = options_.max_restarts,
                                            .restart_window = options_.restart_window},
                                 .self = self,
                                 .welcome = alike,
                                 .server = options_.control};
  if (options_.nodes) {
    coordinator.least_nodes = options_.nodes->least;
    coordinator.nodes = options_.nodes->most;
    coordinator.policy.standby *= options_.nodes->most;
    coordinator.policy.node_timeout = options_.nodes->timeout;
  }
  coordinator_.emplace(
      coordinator, [this](const nlohmann::json& event) { tell(event); }, Clock::now());
  step_members();
}

void Agent::condemn(const NodeMembers::Condemned& one) {
  Worker& worker = workers_.at(ids_.at(one.worker));
  worker.process.condemn(one.cause);
  kill_group(worker, SIGKILL);
}

void Agent::loop() {
  std::array<epoll_event, 64> ready;
  while (running_ > 0 || restarting_ || waits_for_replacements() || waits_for_nodes()) {
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
    settle();
    if (kill_at_.expired()) {
      end("the time to end was over", true);
      kill_at_ = Deadline::never();
    }
  }
}

// What the news lead to. Deaths that nobody has told of yet are looked for first: the likeliest
// cause may be among them.
void Agent::settle() {
  if (deaths_.size() > settled_ && !ending_)
    for (int id = kZygoteId; id <= last_id_; ++id) take_exit(id);
  if (unreplaced_ && !ending_ && !link_) {
    const Death& cause = likeliest();
    if (options_.restart_all && !elastic_ && restarts_ < options_.max_restarts) {
      restarting_ = true;
      tell({{"event", "message"},
            {"text", fmt::format("{}; all workers are started again ({} of {})",
                                 describe(cause.failure), restarts_ + 1, options_.max_restarts)}});
      end(describe(cause.failure), false);
    } else {
      result_.failure = cause.failure;
      WorkerFailure words = cause.failure;
      words.last_words.clear();
      end(describe(words), false);
    }
  }
  settled_ = deaths_.size();
  if (restarting_ && running_ == 0) start_again();
  step_members();
  if (unreplaced_ && !ending_ && !link_) return settle();  // another node's
  if (!ending_ && !done_ && !elastic_ && options_.standby > 0 && only_standbys()) {
    done_ = true;
    signal_workers(SIGKILL);
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
  if (::poll(watched.data(), watched.size(), poll_timeout_ms(next_deadline())) < 0 &&
      errno != EINTR)
    throw Error("cannot watch the workers: " + errno_text(errno));
}

// Nobody runs, but the coordinator has not given up.
bool Agent::waits_for_replacements() const {
  return elastic_ && !ending_ && !done_ && !deaths_.empty();
}

Deadline Agent::next_deadline() const {
  Deadline first = kill_at_;
  const auto also = [&](const Deadline& other) {
    if (other.remaining() < first.remaining()) first = other;
  };
  if (coordinator_ && (options_.nodes || goes_on())) also(coordinator_->again());
  if (link_) also(link_->again());
  also(leave_by_);
  return first;
}

void Agent::take(Source source, int id) {
  if (source == Source::exit) return take_exit(id);
  if (source == Source::signal) return take_signal();
  if (source == Source::zygote) return zygote_ ? take_answers() : void();
  if (source == Source::timer) return take_tick();
  if (source == Source::control) return serve();
  if (source == Source::bound) {
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, options_.nodes->bound_to, nullptr);
    ::kill(::getpid(), SIGTERM);  // read from signals_
    return;
  }
  if (source == Source::link) return;  // settle() looks at it
  Worker& worker = workers_.at(id);
  worker.process.read_some(static_cast<Stream>(source), on_line(worker), on_event(worker));
}

void Agent::take_tick() {
  std::uint64_t ticks;
  if (::read(timer_.get(), &ticks, sizeof ticks) <= 0) return;
  if (options_.on_tick && !muted_) options_.on_tick();
  if (!members_ || !(elastic_ || options_.elastic) || ending_ || done_) return;
  if (coordinator_) coordinator_->tell_recoveries(Clock::now());
  if (members_->began()) strike();
  for (const NodeMembers::Condemned& one : members_->look_for_hung(Clock::now())) condemn(one);
}

// The kills that were asked for, on all nodes of the same ranks: each ends those that are its own.
// It then finds out as it would of any other.
void Agent::strike() {
  for (KillTimer& timer : kills_) {
    const int victim = timer.due(Clock::now(), members_->size());
    for (const auto& [id, worker] : workers_) {
      if (victim < 0 || !worker.running || id == kZygoteId || worker.rank != victim ||
          !members_->is_member(worker.number))
        continue;
      tell({{"event", "injected"},
            {"rank", worker.rank},
            {"fault", "kill"},
            {"clock", seconds(Clock::now().time_since_epoch())}});
      kill_group(worker, SIGKILL);
    }
  }
}

void Agent::take_death(const Worker& worker, const Ending& ending) {
  const std::deque<std::string>& words = worker.process.last_words();
  deaths_.push_back({{.rank = worker.rank,
                      .pid = worker.process.pid(),
                      .cause = ending.cause,
                      .last_words = {words.begin(), words.end()},
                      .place = {},
                      .note = {}},
                     ending.suspicion,
                     ending.for_good});
}

const Agent::Death& Agent::likeliest() const {
  return *std::min_element(deaths_.begin(), deaths_.end(),
                           [](auto& a, auto& b) { return a.suspicion < b.suspicion; });
}

// The coordinator sees no way to go on.
void Agent::fail(const std::string& reason) {
  WorkerFailure failure{.rank = -1, .cause = reason};
  if (!deaths_.empty()) {
    failure = likeliest().failure;
    if (options_.max_restarts > 0 && !likeliest().for_good) failure.note = reason;
  }
  result_.failure = failure;
  end(reason, false);
}

// All workers of a program that does not go on without one of them, as torchrun does.
void Agent::start_again() {
  std::vector<int> kept = children_before_;
  if (zygote_) kept.push_back(workers_.at(kZygoteId).process.pid());
  if (!kill_children_except(kept))
    throw Error("a process that a worker started could not be ended");
  ++restarts_;
  restarting_ = ending_ = unreplaced_ = false;
  kill_at_ = Deadline::never();
  deaths_.clear();
  settled_ = 0;
  ids_.clear();
  segment_ = Segment::create({.seats = segment_->seats()});
  result_.segment = segment_;
  spared_ = 0;
  members_.reset();
  if (options_.zygote && !zygote_) start_zygote();  // it was ended with the workers
  begin_job();
}

JobStatus Agent::status() {
  JobStatus status = coordinator_ ? coordinator_->status() : JobStatus{};
  if (ending_ || done_) status.reason = "the job is about to end";
  return status;
}

void Agent::scale(int workers) {
  if (!elastic_ || ending_ || done_ || result_.stopped)
    throw Error(elastic_ ? "the job is about to end"
                         : "the job's program has not said that it can go on with others");
  coordinator_->scale(workers);
}

// Preemption: the step under way is the last.
void Agent::stop() {
  if (result_.stopped || ending_ || done_) return;
  result_.stopped = true;
  if (!elastic_ || !began()) return end("the job was ended by a request", false);
  request_stop(*segment_);
  if (coordinator_) coordinator_->stop();
  kill_at_ = Deadline::after(options_.stop_grace);
}

void Agent::take_signal() {
  signalfd_siginfo info;
  while (::read(signals_.get(), &info, sizeof info) == sizeof info) {
    const int number = static_cast<int>(info.ssi_signo);
    const bool again = result_.signal != 0;
    if (!again) result_.signal = number;
    restarting_ = false;
    const bool asks = number == SIGTERM && !again && elastic_ && began() && !ending_;
    // Where fewer nodes are enough, the others go on without this one.
    const bool stops = asks && link_ && options_.nodes->least == options_.nodes->most;
    if (link_ && !again && goes_on()) tell_signal(number, stops);
    if (stops)
      link_->stop();
    else if (asks && !link_)
      stop();
    else
      end(fmt::format("the job was ended by {}", signal_name(number)), again);
  }
}

// Once: tells the workers' groups and asks the processes to go. at_once: without asking.
void Agent::end(const std::string& reason, bool at_once) {
  if (at_once) {
    signal_workers(SIGKILL);
  } else if (!ending_) {
    if (segment_) segment_->abort(reason);
    signal_workers(SIGTERM);
    signal_workers(SIGCONT);  // one that is stopped hears of it only then
    kill_at_ = Deadline::after(options_.grace);
  }
  ending_ = true;
  if (coordinator_ && !restarting_) coordinator_->end(false, reason);
  if (zygote_ && !restarting_) kill_group(workers_.at(kZygoteId), SIGKILL);  // no more workers
}

bool Agent::only_standbys() const {
  return std::all_of(workers_.begin(), workers_.end(), [](const auto& entry) {
    return entry.first == kZygoteId || !entry.second.running || entry.second.rank < 0;
  });
}

void Agent::tell(const nlohmann::json& event) {
  if (link_ && (event["event"] == "worker" || event["event"] == "injected")) link_->tell(-1, event);
  if (options_.on_event && !muted_) options_.on_event(-1, event);
}

void Agent::finish() {
  const bool gone = kill_children_except(children_before_);
  for (auto& [id, worker] : workers_) {
    worker.process.drain(on_line(worker), on_event(worker));
    worker.process.finish_lines(on_line(worker));
  }
  if (coordinator_) coordinator_->finish();
  if (!trace_.empty()) write_trace(*segment_, trace_);
  if (!gone) throw Error("a process that a worker started could not be ended");
  result_.ok = !ending_;
}

AgentResult run_agent(const AgentOptions& options) { return Agent(options).run(); }

std::string describe(const WorkerFailure& failure) {
  std::string text = failure.rank < 0 ? failure.cause
                                      : fmt::format("rank {} (pid {}{}): {}", failure.rank,
                                                    failure.pid, failure.place, failure.cause);
  for (const std::string& line : failure.last_words) text += "\n  " + line;
  if (!failure.note.empty()) text += "\nwhy it did not go on: " + failure.note;
  return text;
}

}  // namespace lockstep
