#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <filesystem>

#include "lockstep/cluster/agent_machine.h"
#include "lockstep/cluster/spawn.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

constexpr int kMostZygotes = 3;         // in a row that were killed before they started a worker
constexpr std::size_t kMostAsked = 16;  // requests that a zygote has not answered yet

}  // namespace

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
  environment["TORCHELASTIC_MAX_RESTARTS"] = std::to_string(options_.max_restarts);
  environment.emplace("ROLE_NAME", "default");
  if (options_.threads)
    environment["OMP_NUM_THREADS"] = std::to_string(*options_.threads);
  else if (options_.workers > 1)
    environment.emplace("OMP_NUM_THREADS", "1");
  // Big blocks stay in the process: given back to the kernel, every step would fault them in again.
  environment.emplace("GLIBC_TUNABLES",
                      "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776");
  for (const char* name :
       {"LOCKSTEP_LAUNCHER", "LOCKSTEP_GENERATION", "LOCKSTEP_SEGMENT_FD", "LOCKSTEP_SEAT"})
    environment.erase(name);
  return environment;
}

Environment Agent::place_environment(int seat, int rank) const {
  Environment environment;
  // A standby's rank is not known yet; a program may want one.
  const int local = seat % options_.workers;
  const int number = rank >= 0 ? rank : welcome_.first_rank + local;
  for (const char* name : {"RANK", "ROLE_RANK"}) environment[name] = std::to_string(number);
  // A node that comes late has workers beyond those that the job began with.
  const int size = std::max({welcome_.workers, welcome_.first_rank + options_.workers, number + 1});
  for (const char* name : {"WORLD_SIZE", "ROLE_WORLD_SIZE"})
    environment[name] = std::to_string(size);
  environment["LOCAL_RANK"] = std::to_string(options_.nodes ? local : number);
  environment["LOCAL_WORLD_SIZE"] = std::to_string(options_.workers);
  environment["GROUP_RANK"] = std::to_string(options_.nodes ? options_.nodes->rank : 0);
  environment["GROUP_WORLD_SIZE"] = std::to_string(
      // More may come: the workers must be able to talk to them.
      options_.nodes && options_.nodes->least < options_.nodes->most ? options_.nodes->most
                                                                     : welcome_.nodes);
  environment["MASTER_ADDR"] = welcome_.master_addr;
  environment["MASTER_PORT"] = std::to_string(welcome_.master_port);
  environment["TORCHELASTIC_RESTART_COUNT"] = std::to_string(welcome_.restarts);
  environment["TORCHELASTIC_RUN_ID"] = welcome_.run_id;
  if (!segment_) return environment;
  environment["LOCKSTEP_LAUNCHER"] = "lockstep";
  environment["LOCKSTEP_GENERATION"] = "0";
  environment["LOCKSTEP_SEGMENT_FD"] = std::to_string(segment_->fd());
  environment["LOCKSTEP_SEAT"] = std::to_string(seat);
  return environment;
}

void Agent::start_zygote() {
  StreamEnds streams = make_streams();
  zygote_.emplace();
  add_worker(kZygoteId, 0, std::move(streams.read));
  runs(kZygoteId, zygote_->start(options_.command, common_environment(), streams.write));
  watch(zygote_->socket(), Source::zygote, kZygoteId);
}

int Agent::start_worker(int seat, int rank) {
  const int id = ++last_id_;
  StreamEnds streams = make_streams();
  add_worker(id, rank, std::move(streams.read));
  ++running_;
  if (options_.zygote) {
    requests_.push_back({.id = id,
                         .environment = place_environment(seat, rank),
                         .streams = std::move(streams.write)});
    ask_zygote();
  } else {
    Environment environment = place_environment(seat, rank);
    environment.merge(common_environment());
    runs(id, spawn(options_.command, std::move(environment), streams.write,
                   segment_ ? segment_->fd() : -1));
  }
  return id;
}

Agent::Worker& Agent::add_worker(int id, int rank, Streams streams) {
  Worker& worker = workers_[id];
  worker = Worker{.process = WorkerProcess(std::move(streams)), .rank = rank, .running = true};
  worker.process.rank = rank;
  watch(worker.process.stream(Stream::output).get(), Source::output, id);
  watch(worker.process.stream(Stream::error).get(), Source::error, id);
  watch(worker.process.stream(Stream::events).get(), Source::events, id);
  return worker;
}

void Agent::runs(int id, Process process) {
  watch(process.pidfd.get(), Source::exit, id);
  guardian_->watch(process.pid);
  workers_.at(id).process.started(std::move(process));
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
    if (zygote_->request(request.environment, request.streams, segment_->fd()) != 0) return;
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
    runs(id, adopt(*pid));
    // It may have become unneeded before it was forked.
    if (ending_ || done_ || workers_.at(id).process.is_condemned()) ::kill(-*pid, SIGKILL);
    if (members_) members_->runs(workers_.at(id).number, *pid, Clock::now());
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
  zygote_.reset();
  const bool killed = ending.signal != 0 && ++zygotes_lost_ <= kMostZygotes;
  if (!ending_ && !done_ && killed) {
    start_zygote();
    return ask_zygote();
  }
  if (!ending_ && !done_) {
    take_death(workers_.at(kZygoteId), ending);
    unreplaced_ = true;
  }
  drop_requests();
}

// Those that will not be started any more.
void Agent::drop_requests() {
  running_ -= int(requests_.size());
  for (const Request& request : requests_) workers_.at(request.id).running = false;
  requests_.clear();
}

WorkerProcess::OnLine Agent::on_line(const Worker& worker) {
  return [&](bool error, std::string_view line) {
    if (options_.on_line && !muted_) options_.on_line(worker.rank, error, line);
  };
}

WorkerProcess::OnEvent Agent::on_event(Worker& worker) {
  if (muted_) return {};
  return [&](const nlohmann::json& event) { take_event(worker, event); };
}

void Agent::take_event(Worker& worker, const nlohmann::json& event) {
  const std::string& name = event["event"].get_ref<const std::string&>();
  const bool of_zygote = &worker == &workers_[kZygoteId];
  if (members_ && !of_zygote) {
    if (name == "elastic") elastic_ = true;
    if (name == "recovered") deaths_.clear(), settled_ = 0;
    members_->says(worker.number, event, Clock::now());
    if (coordinator_) coordinator_->says(worker.rank, event, Clock::now());
    if (coordinator_ && name == "injected") coordinator_->struck(event);
    // What a snapshot names is in this node's memory.
    if (link_ && name != "snapshot" && name != "join") link_->tell(worker.rank, event);
  }
  if (options_.on_event) options_.on_event(worker.rank, event);
}

void Agent::take_exit(int id) {
  const auto found = workers_.find(id);
  if (found == workers_.end() || !found->second.running) return;
  Worker& worker = found->second;
  const std::optional<Ending> ending = worker.process.take_exit(on_line(worker), on_event(worker));
  if (!ending) return;
  worker.running = false;
  guardian_->forget(worker.process.pid());
  if (id == kZygoteId) return zygote_ended(*ending);
  --running_;
  const bool failed = ending->signal != 0 || ending->code != 0;
  if (ending_ || done_) return;
  if (failed) take_death(worker, *ending);
  const bool replaced =
      options_.max_restarts > 0 || (options_.least > 0 && options_.least < options_.workers);
  const bool member =
      members_ && (elastic_ || (failed && options_.elastic && replaced && !ending->for_good));
  if (member)
    members_->ended(worker.number, *ending, Clock::now());
  else if (failed)
    unreplaced_ = true;
  if (failed && link_) tell_death(deaths_.back(), worker.rank, member);
}

void Agent::kill_group(const Worker& worker, int number) {
  if (worker.running && worker.process.pid() != 0) ::kill(-worker.process.pid(), number);
}

void Agent::signal_workers(int number) {
  for (const auto& [id, worker] : workers_) kill_group(worker, number);
}

}  // namespace lockstep
