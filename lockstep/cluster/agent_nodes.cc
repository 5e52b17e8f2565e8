// The agent between its workers, as members, and the coordinator, here or on another node.
#include <signal.h>
#include <unistd.h>

#include "lockstep/cluster/agent_machine.h"
#include "lockstep/cluster/control_file.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

// To hear that the others know of the end, beyond the time that their workers have.
constexpr auto kLeave = std::chrono::seconds(3);

}  // namespace

NodeIntroduction Agent::introduction() const {
  const Clock::duration since_boot = Clock::now().time_since_epoch();
  static const std::string agent = fmt::format("{}.{}", ::getpid(), since_boot.count());
  return {.rank = options_.nodes ? options_.nodes->rank : 0,
          .host = host_name(),
          .agent = agent,
          .least = options_.least > 0 ? options_.least : options_.workers,
          .workers = options_.workers,
          .same = options_.nodes ? options_.nodes->same : std::map<std::string, std::string>{}};
}

// All nodes are there.
void Agent::begin_life(const NodeWelcome& welcome) {
  welcome_ = welcome;
  members_.emplace(MembersOptions{.welcome = welcome,
                                  .self = introduction(),
                                  .standby = options_.standby,
                                  .hang_timeout = options_.hang_timeout,
                                  .start_timeout = options_.start_timeout},
                   segment_, [this](const nlohmann::json& event) { tell(event); });
}

// What the coordinator wants, until it wants nothing more.
void Agent::step_members() {
  if (link_) return step_link();
  if (!coordinator_) return;
  const Clock::time_point now = Clock::now();
  if (!members_ && goes_on())
    if (const auto welcome = coordinator_->gather(now)) begin_life(*welcome);
  if (elastic_ || options_.elastic) coordinator_->set_elastic();
  while (members_ && (options_.nodes || goes_on()) &&
         (members_->changed() || coordinator_->due(now))) {
    coordinator_->take(members_->report(now), now);
    const Assignment assignment = coordinator_->decide(now);
    if (goes_on()) follow(assignment, now);
    if (options_.nodes) serve();
  }
}

void Agent::follow(const Assignment& assignment, Clock::time_point now) {
  const NodeMembers::Steps steps = members_->follow(assignment, now);
  for (auto& [id, worker] : workers_)
    if (const int rank = worker.running && id != kZygoteId ? members_->rank_of(worker.number) : -1;
        rank >= 0)
      worker.rank = worker.process.rank = rank;
  for (const NodeMembers::Condemned& one : steps.kill) condemn(one);
  for (const int seat : steps.start) {
    const std::uint64_t number = members_->start(seat);
    const int id = start_worker(seat, members_->rank_of(number));
    workers_.at(id).number = number;
    ids_[number] = id;
    if (const int pid = workers_.at(id).process.pid(); pid != 0) members_->runs(number, pid, now);
  }
  if (!options_.zygote && !steps.start.empty() && !members_->began())
    for (const auto& [number, id] : ids_) check_exec(workers_.at(id).process);
  if (steps.end && steps.end->ok) {
    done_ = true;
    signal_workers(SIGKILL);  // standbys
  } else if (steps.end) {
    fail(steps.end->reason);
  }
}

void Agent::make_link() {
  if (link_) return link_->join_again(Clock::now());
  link_.emplace(options_.nodes->coordinator.value(), introduction(), Clock::now());
  watch(link_->fd(), Source::link, 0);
}

// Requests of other nodes and of people.
void Agent::serve() {
  const Clock::time_point now = Clock::now();
  const auto note_ends = [&] {
    for (const int connection : options_.control->ended_connections())
      if (coordinator_) coordinator_->disconnected(connection, now);
  };
  options_.control->handle([&](const ControlRequest& request, const ControlPeer& peer) {
    note_ends();
    if (coordinator_ && CoordinatorService::is_for_me(request))
      return coordinator_->answer(request, peer, now);
    return answer_command(*this, request);
  });
  note_ends();
  if (!coordinator_) return;
  for (const CoordinatorService::NodeEvent& told : coordinator_->events())
    take_from_node(told.rank, told.event);
  spare(coordinator_->struck_elsewhere());
  if (coordinator_->stop_asked()) stop();
  for (const std::string& cause : coordinator_->lost_nodes()) {
    if (elastic_ || options_.elastic || !goes_on()) continue;  // the coordinator sees to it
    deaths_.push_back({.failure = {.rank = -1, .cause = cause}});
    unreplaced_ = true;
  }
}

// What another node's worker or agent says. Damaged ones are dropped: their agent has checked them.
void Agent::take_from_node(int rank, const nlohmann::json& event) {
  try {
    const std::string& name = event.at("event").get_ref<const std::string&>();
    if (name == "death") {
      deaths_.push_back({.failure = {.rank = rank,
                                     .pid = event.at("pid"),
                                     .cause = event.at("cause"),
                                     .last_words = event.at("last_words"),
                                     .place = event.at("place")},
                         .suspicion = event.at("suspicion"),
                         .for_good = event.at("for_good")});
      settled_ = deaths_.size();  // whoever died there was looked for there
      unreplaced_ |= goes_on() && event.at("replaced") == false;
      return;
    }
    if (name == "elastic") elastic_ = true;
    if (name == "recovered") deaths_.clear(), settled_ = 0;
    coordinator_->says(rank, event, Clock::now());
  } catch (const nlohmann::json::exception&) {
    return;
  }
  if (options_.on_event && !muted_) options_.on_event(rank, event);
}

// A fault strikes once in the job's life, whichever node its rank is on then.
void Agent::spare(const std::vector<std::string>& struck) {
  if (spared_ >= struck.size()) return;
  const std::vector<Fault> faults = faults_from_text(common_environment()["LOCKSTEP_INJECT"]);
  for (; spared_ < struck.size(); ++spared_)
    for (std::size_t i = 0; i < faults.size(); ++i)
      if (to_text(faults[i]) == struck[spared_] && claim_fault(*segment_, static_cast<int>(i)))
        break;
}

// Before anybody here ends: else node 0 would see no more than that a connection has ended.
void Agent::tell_signal(int number, bool stops) {
  const bool all = options_.nodes->least == options_.nodes->most;
  const std::string what =
      fmt::format("node {} was {} {}: {}", options_.nodes->rank, stops ? "sent" : "ended by",
                  signal_name(number),
                  stops ? "all nodes finish the step under way, and node 0 saves"
                  : all ? "the job ends, which needs all its nodes"
                        : "it leaves the job");
  const nlohmann::json event{{"event", "message"}, {"text", what}};
  tell(event);
  if (all && !stops)
    tell_death({.failure = {.cause = what}, .suspicion = -1}, -1, false);
  else
    link_->tell(-1, event);
  step_link();
}

void Agent::tell_death(const Death& death, int rank, bool replaced) {
  link_->tell(rank, {{"event", "death"},
                     {"pid", death.failure.pid},
                     {"cause", death.failure.cause},
                     {"last_words", death.failure.last_words},
                     {"place", fmt::format(" on node {}", options_.nodes->rank)},
                     {"suspicion", death.suspicion},
                     {"for_good", death.for_good},
                     {"replaced", replaced}});
}

void Agent::step_link() {
  const Clock::time_point now = Clock::now();
  if (members_ && goes_on() && members_->lease_is_over(now))
    return end_this_life("no word from node 0: this node's workers are ended");
  if (members_ && running_ == 0 && !restarting_ && !goes_on()) {
    link_->report(members_->report(now), now, /*left=*/true);
  } else if (members_ && (members_->changed() || link_->again().expired(now))) {
    link_->report(members_->report(now), now);
  }
  const CoordinatorLink::News news = link_->receive(now);
  if (!goes_on()) return;
  if (!news.waiting.empty()) tell({{"event", "message"}, {"text", "waiting: " + news.waiting}});
  if (news.ended) return end("the job has ended", false);
  if (news.unknown) return end_this_life("node 0 has given this node up: its workers are ended");
  spare(news.struck);
  if (news.welcome) begin_life(*news.welcome);
  if (members_ && news.assignment) follow(*news.assignment, now);
  if (news.stop && goes_on()) stop();
}

// Its workers end at once, and it joins as another one.
void Agent::end_this_life(const std::string& reason) {
  tell({{"event", "message"}, {"text", reason}});
  restarting_ = true;
  end(reason, true);
}

bool Agent::waits_for_nodes() {
  if (!options_.nodes) return false;
  if (running_ == 0 && goes_on() && !ids_.empty() && !elastic_ && deaths_.empty()) {
    if (coordinator_) coordinator_->finished();
    if (link_) link_->finished();
  }
  if (goes_on() || restarting_) return true;
  if (running_ > 0) return true;
  if (link_ ? !link_->joined() || link_->left() : coordinator_->all_know()) return false;
  if (leave_by_.is_never())
    leave_by_ = Deadline::after(kLeave + (link_ ? Clock::duration{} : options_.grace));
  return !leave_by_.expired();
}

}  // namespace lockstep
