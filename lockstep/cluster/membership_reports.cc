// What the reports say: taken, merged, counted.
#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/cluster/membership_machine.h"

namespace lockstep {

// A coordinator that follows another does not know which numbers that one gave to nodes that are
// silent now: it leaves room for them.
constexpr std::uint64_t kNumbersLeftOut = 100;
// From the end of a connection; who lives makes another by then.
constexpr auto kReconnectPatience = std::chrono::milliseconds(300);

std::string count_of(std::size_t number, std::string_view what) {
  return fmt::format("{} {}{}", number, what, number == 1 ? "" : "s");
}

std::string in_seconds(Clock::duration duration) {
  return fmt::format("{:g} s", seconds(duration));
}

void Coordinator::Machine::take(const NodeReport& report, Clock::time_point now) {
  const auto [found, is_new] = nodes_.try_emplace(report.node);
  Node& node = found->second;
  if (!is_new && report.version <= node.report.version) return;
  for (const WorkerReport& worker : report.workers) merge(node, worker, report.version);
  // One that has come and gone between two reports.
  for (std::uint64_t i = node.report.started; i < report.started && !is_new; ++i)
    if (!node.workers.contains(i))
      node.workers[i].report = {.incarnation = i, .state = WorkerState::failed, .cause = "ended"};
  for (auto& [incarnation, worker] : node.workers)
    if (worker.seen != report.version && !ended(worker.report.state)) {
      worker.report.state = WorkerState::failed;
      worker.report.cause = "ended";
    }
  std::erase_if(node.workers, [&](const auto& entry) {
    const Worker& worker = entry.second;
    return worker.seen != report.version && worker.rank < 0 && !worker.leaving && worker.accounted;
  });
  if (listening_ && report.generation &&
      (!generation_ || report.generation->number > generation_->number)) {
    generation_ = report.generation;
    over_ = generation_->over;
  }
  if (report.taken_up) taken_up_ = std::max(taken_up_.value_or(0), *report.taken_up);
  committed_ = std::max(committed_, report.committed);
  node.report = report;
  node.report.workers.clear();
  node.report.generation = nullptr;
  // Who comes with a node is no restart.
  if (is_new) losses_ -= std::min<std::size_t>(losses_, std::max(0, report.room));
  node.start = std::max(node.start, report.started);
  node.heard = now;
  node.closed = std::nullopt;
  node.lost = false;
}

void Coordinator::Machine::disconnected(int node, Clock::time_point now) {
  if (const auto found = nodes_.find(node); found != nodes_.end()) found->second.closed = now;
}

// A worker never lives again: a node that was given up may send an old report.
void Coordinator::Machine::merge(Node& node, const WorkerReport& report, std::uint64_t version) {
  Worker& worker = node.workers[report.incarnation];
  const WorkerReport before = worker.report;
  worker.report = report;
  if (before.state > report.state) {
    worker.report.state = before.state;
    worker.report.cause = before.cause;
  }
  worker.seen = version;
  worker.was_ready |= report.state == WorkerState::ready;
  worker.was_member |= report.listed.has_value();
}

void Coordinator::Machine::finish_listening() {
  listening_ = false;
  if (!generation_) return;
  numbers_left_out_ = kNumbersLeftOut;
  for (const auto* list : {&generation_->members, &generation_->leaving})
    for (const Member& member : *list)
      if (find(member) == nullptr)
        nodes_[member.node].workers[member.incarnation].report = {
            .seat = member.seat,
            .incarnation = member.incarnation,
            .state = WorkerState::failed,
            .cause = "was not heard of after the coordinator had started again"};
  set_ranks();
}

void Coordinator::Machine::lose_silent_nodes(Clock::time_point now) {
  if (policy_.node_timeout == Clock::duration::max()) return;
  for (auto& [id, node] : nodes_) {
    if (node.lost) continue;
    const Clock::time_point silent_until = node.heard + policy_.node_timeout;
    const bool gone = node.closed && *node.closed + kReconnectPatience < silent_until;
    if (const auto until = gone ? *node.closed + kReconnectPatience : silent_until; now < until) {
      wake(until);
      continue;
    }
    const std::string who =
        name(id) + (node.report.host.empty() ? "" : fmt::format(" ({})", node.report.host));
    const std::string cause =
        gone ? fmt::format("lost: the connection to {} has ended", who)
             : fmt::format("lost: {} is silent for {}", who, in_seconds(policy_.node_timeout));
    decision_.lost_nodes.push_back({id, cause});
    node.lost = true;
    node.start = node.report.started;
    for (auto& [incarnation, worker] : node.workers) {
      if (ended(worker.report.state)) continue;
      worker.report.state = WorkerState::failed;
      worker.report.cause = cause;
    }
  }
}

void Coordinator::Machine::account_for_the_lost() {
  news_ = false;
  for (auto& [id, node] : nodes_)
    for (auto& [incarnation, worker] : node.workers)
      if (!lives(worker.report.state) && !worker.accounted) account(id, worker);
}

void Coordinator::Machine::account(int id, Worker& worker) {
  worker.accounted = true;
  const bool member = worker.rank >= 0;
  const bool finished = worker.report.state == WorkerState::finished;
  if (worker.unneeded || (worker.was_member && !member && !worker.leaving)) return;
  if (finished && worker.was_member) return;
  ++losses_;
  const std::string words =
      name(id, worker) + " " + (finished ? "exited before it was a member" : worker.report.cause);
  if (member || worker.leaving) {
    lost_.push_back(words);
    news_ = true;
    if (member) decision_.lost.push_back({worker.rank, worker.report.cause});
  } else {
    asides_.push_back(words);
  }
  if (!worker.report.failed_for_good) return;
  if (member || !generation_)
    finish(false, words);
  else if (!worker.was_member)
    hopeless_ = words;
}

Coordinator::Machine::Tally Coordinator::Machine::count() {
  Tally tally;
  const auto look = [&](const Member& member, std::vector<Member>& living) {
    Worker* const worker = find(member);
    if (worker != nullptr && taken_up()) worker->may_go = false;
    const WorkerState state = worker != nullptr ? worker->report.state : WorkerState::failed;
    if (lives(state)) living.push_back(member);
    const bool gone = state == WorkerState::finished && worker->may_go;
    tally.gone += gone ? 1 : 0;
    tally.lost |= state == WorkerState::dying || state == WorkerState::failed || gone;
    tally.dying |= state == WorkerState::dying;
    if (lives(state) && worker->report.comm_error.value_or(0) >= over_ &&
        worker->report.comm_error && tally.failed_group == nullptr) {
      tally.failed_group = worker;
      tally.failed_node = member.node;
    }
    return state;
  };
  if (generation_) {
    for (const Member& member : generation_->members)
      tally.finished += look(member, tally.staying) == WorkerState::finished ? 1 : 0;
    tally.finished -= tally.gone;
    finishing_ |= tally.finished > 0;
    if (!taken_up())
      for (const Member& member : generation_->leaving) look(member, tally.leaving);
  }
  for (const auto& [id, node] : nodes_) {
    if (node.lost) continue;
    tally.starting += node.ordered();
    for (const auto& [incarnation, worker] : node.workers) {
      if (worker.may_join()) tally.waiting.push_back({id, worker.report.seat, incarnation});
      tally.starting += worker.may_become_ready() ? 1 : 0;
    }
  }
  return tally;
}

Assignment Coordinator::Machine::assignment(int id) const {
  const auto found = nodes_.find(id);
  if (found == nodes_.end()) {
    Assignment nothing;
    nothing.term = term_;
    return nothing;
  }
  const Node& node = found->second;
  Assignment answer{.term = term_,
                    .acknowledged = node.report.version,
                    .generation = listening_ ? nullptr : generation_,
                    .over = listening_ ? 0 : over_,
                    .start = node.start,
                    .kill = {},
                    .taken_up = taken_up_,
                    .end = end_};
  for (const auto& [incarnation, worker] : node.workers)
    if (worker.unneeded && lives(worker.report.state)) answer.kill.push_back(incarnation);
  return answer;
}

void Coordinator::Machine::set_ranks() {
  int rank = 0;
  for (const Member& member : generation_->members)
    if (Worker* const worker = find(member)) {
      worker->rank = worker->last_rank = rank++;
      worker->was_member = true;
    }
  for (const Member& member : generation_->leaving)
    if (Worker* const worker = find(member)) worker->leaving = worker->was_member = true;
}

Coordinator::Machine::Worker* Coordinator::Machine::find(const Member& member) {
  const auto node = nodes_.find(member.node);
  if (node == nodes_.end()) return nullptr;
  const auto worker = node->second.workers.find(member.incarnation);
  return worker == node->second.workers.end() ? nullptr : &worker->second;
}

std::string Coordinator::Machine::name(int node) const {
  const auto found = nodes_.find(node);
  const int rank = found == nodes_.end() ? -1 : found->second.report.rank;
  return fmt::format("node {}", rank >= 0 ? rank : node);
}

std::string Coordinator::Machine::name(int node, const Worker& worker) const {
  const std::string place = nodes_.size() > 1 ? " on " + name(node) : "";
  const std::string who = worker.rank >= 0        ? fmt::format("rank {}", worker.rank)
                          : worker.last_rank >= 0 ? fmt::format("former rank {}", worker.last_rank)
                          : worker.was_ready      ? "a waiting worker"
                                                  : "a starting worker";
  return fmt::format("{} (pid {}{})", who, worker.report.pid, place);
}

}  // namespace lockstep
