#include "lockstep/cluster/coordinator_service.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/cluster/membership_wire.h"
#include "lockstep/memory/generation_board.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr int kThisNode = 0;
constexpr auto kGather = std::chrono::minutes(10);
// Where fewer than `nodes` are enough: from the last one that came.
constexpr auto kMorePatience = std::chrono::seconds(5);
constexpr auto kAsks = std::chrono::seconds(2);  // who waits to join has asked within
constexpr auto kLook = std::chrono::milliseconds(250);
constexpr std::size_t kMostEvents = 100'000;  // of a node in one message

std::string name_of(const NodeIntroduction& node) {
  return fmt::format("node {} ({})", node.rank, node.host);
}

json wait_for(const std::string& what) { return {{"wait", what}}; }

}  // namespace

CoordinatorService::CoordinatorService(const CoordinatorOptions& options, Emit emit,
                                       Clock::time_point now)
    : options_(options),
      emit_(emit),
      recoveries_(emit),
      began_(now),
      newest_join_(now),
      looked_(now) {
  LOCKSTEP_CHECK(options.nodes == 1 || options.server != nullptr);
}

// --- Gathering ---

std::optional<NodeWelcome> CoordinatorService::gather(Clock::time_point now) {
  std::size_t here = 1;
  for (const auto& [rank, node] : nodes_) here += now - node.seen < kAsks ? 1 : 0;
  const auto all = static_cast<std::size_t>(options_.nodes);
  const bool enough = here >= static_cast<std::size_t>(options_.least_nodes);
  if (here != all && !(enough && now - newest_join_ > kMorePatience)) {
    if (std::exchange(told_, here) != here)
      emit_({{"event", "message"}, {"text", fmt::format("{} of {} nodes are here", here, all)}});
    if (now - began_ < kGather) return std::nullopt;
    std::vector<int> missing;
    for (int rank = 1; rank < options_.nodes; ++rank)
      if (!nodes_.contains(rank)) missing.push_back(rank);
    throw Error(fmt::format("{} of {} nodes came within {:.0f} s; missing: {}", here, all,
                            seconds(kGather), fmt::join(missing, ", ")));
  }
  std::erase_if(nodes_, [&](const auto& entry) { return now - entry.second.seen >= kAsks; });
  begin(now);
  return welcome_;
}

void CoordinatorService::begin(Clock::time_point now) {
  const int absent = options_.nodes - 1 - static_cast<int>(nodes_.size());
  const bool fixed = options_.least_nodes == options_.nodes;
  NodeWelcome welcome = options_.welcome;
  welcome.least = options_.self.least * (fixed ? 1 : options_.least_nodes);
  welcome.most = welcome.workers = options_.self.workers;
  for (const auto& [rank, node] : nodes_) {
    welcome.workers += node.introduction.workers;
    if (fixed) welcome.least += node.introduction.least;
  }
  welcome.most = welcome.workers + absent * options_.self.workers;
  welcome.nodes = 1 + static_cast<int>(nodes_.size());
  Policy policy = options_.policy;
  policy.least = welcome.least;
  policy.most = welcome.most;
  if (options_.nodes > 1) {
    // The node learns that its workers are lost a while before the coordinator gives it up.
    welcome.lease = policy.node_timeout * 2 / 3;
    // A failed group is often the first news of a lost node.
    policy.comm_error_patience =
        std::max<Clock::duration>(policy.comm_error_patience, policy.node_timeout * 3 / 2);
  } else {
    policy.node_timeout = Clock::duration::max();
  }
  coordinator_.emplace(policy, steady(now));
  welcome_ = welcome;
  welcome_->node = kThisNode;
  first_rank_ = options_.self.workers;
  for (auto& [rank, node] : nodes_) admit(node, now);
  changed_ = true;
}

// As if it had reported: so that it is known how many workers it will start.
void CoordinatorService::admit(Node& node, Clock::time_point now) {
  // Never one that it has had, also of the coordinator before all were started again.
  node.lives = std::max(node.lives, node.introduction.after / options_.nodes +
                                        (node.introduction.after >= 0 ? 1 : 0));
  node.life = node.introduction.rank + options_.nodes * node.lives++;
  node.welcome = *welcome_;
  node.welcome.node = node.life;
  node.welcome.first_rank = first_rank_ % welcome_->most;
  first_rank_ += node.introduction.workers;
  node.events = node.published = 0;
  node.finished = node.left = node.lost = false;
  node.sent = nullptr;
  NodeReport report;
  report.node = node.life;
  report.rank = node.introduction.rank;
  report.host = node.introduction.host;
  report.room = node.introduction.workers;
  coordinator_->take(report, steady(now));
  changed_ = true;
}

json CoordinatorService::join(const NodeIntroduction& introduction, const ControlPeer& peer,
                              Clock::time_point now) {
  if (introduction.rank < 1 || introduction.rank >= options_.nodes)
    throw ConfigError(fmt::format("node rank {}: this job has nodes 0 to {}", introduction.rank,
                                  options_.nodes - 1),
                      "--nnodes and --node-rank must fit on all nodes");
  try {
    check_same(introduction, options_.self);
  } catch (const ConfigError& error) {
    emit_({{"event", "message"}, {"text", error.what()}});
    throw;
  }
  if (ended_) return {{"ended", true}};
  const auto [found, is_new] = nodes_.try_emplace(introduction.rank);
  Node& node = found->second;
  const bool itself = is_new || node.introduction.agent == introduction.agent;
  const bool lives = node.life >= 0 && !node.lost && !node.left;
  if (!itself && (lives || (node.life < 0 && now - node.seen < kAsks)))
    return wait_for(fmt::format("{} is here already", name_of(node.introduction)));
  const bool asked_lately = !is_new && now - node.seen < kAsks;
  node.introduction = introduction;
  node.peer = peer;
  node.seen = now;
  changed_ = true;
  if (!coordinator_) {
    if (!asked_lately) newest_join_ = now;
    return wait_for("for the other nodes");
  }
  if (lives && node.life != introduction.after) return {{"welcome", to_json(node.welcome)}};
  if (lives) {  // it has ended that one itself
    coordinator_->disconnected(node.life, Clock::time_point::min());
    return wait_for("for the end of what it was before");
  }
  if (coordinator_->generation() && !elastic_)
    return wait_for("the job has begun, and its program has not said that it can take in others");
  admit(node, now);
  return {{"welcome", to_json(node.welcome)}};
}

// --- What other nodes say ---

bool CoordinatorService::is_for_me(const ControlRequest& request) {
  return request.action == "join" || request.action == "report";
}

json CoordinatorService::answer(const ControlRequest& request, const ControlPeer& peer,
                                Clock::time_point now) {
  if (request.action == "join") return join(introduction_from(request.arguments), peer, now);
  return report(request, peer, now);
}

json CoordinatorService::report(const ControlRequest& request, const ControlPeer& peer,
                                Clock::time_point now) {
  const json& said = request.arguments;
  const auto body = said.find("report");
  if (body == said.end() || !body->is_object()) throw ConfigError("it has no report");
  const NodeReport report = node_report_from(*body);
  const auto found = nodes_.find(report.node % options_.nodes);
  if (found == nodes_.end() || found->second.life != report.node || found->second.lost ||
      !coordinator_)
    return {{"unknown", true}};
  Node& node = found->second;
  node.peer = peer;
  node.request = request.id;
  node.published = std::max(node.published, whole_in(said, "published"));
  node.finished |= said.value("finished", json()) == true;
  node.left |= said.value("left", json()) == true;
  const std::uint64_t first = whole_in(said, "first");
  const auto events = said.find("events");
  if (events == said.end() || !events->is_array() || events->size() > kMostEvents)
    throw ConfigError("it has no list of events");
  for (std::uint64_t i = 0; i < events->size(); ++i) {
    const json& one = (*events)[i];
    if (first + i != node.events) continue;  // told before
    ++node.events;
    if (!one.is_object() || !one.contains("event") || !one["event"].is_object() ||
        !one["event"].contains("event") || !one["event"]["event"].is_string() ||
        !one.contains("rank") || !one["rank"].is_number_integer())
      continue;
    events_.push_back({one["rank"], one["event"]});
    if (one["event"]["event"] == "injected") struck(one["event"], node.life);
    // Of another machine's clock.
    if (one["event"].contains("clock")) events_.back().event["clock"] = clock_of(now);
  }
  if (said.value("stop", json()) == true) stop();
  coordinator_->take(report, steady(now));
  // What was still on the way when the connection ended is no sign of life.
  if (peer.route == node.closed_route)
    coordinator_->disconnected(node.life, steady(node.closed_at));
  changed_ = true;
  return answer_for(node);
}

void CoordinatorService::disconnected(int connection, Clock::time_point now) {
  for (auto& [rank, node] : nodes_)
    if (coordinator_ && node.life >= 0 && node.peer.connection == connection && !node.left) {
      node.closed_route = node.peer.route;
      node.closed_at = now;
      coordinator_->disconnected(node.life, steady(now));
      changed_ = true;
    }
}

json CoordinatorService::assignment_for(const Node& node) const {
  Assignment assignment = coordinator_->assignment(node.life);
  if (assignment.generation && assignment.generation->number < node.published)
    assignment.generation = nullptr;
  return to_json(assignment);
}

json CoordinatorService::answer_for(Node& node) {
  node.sent = {{"assignment", assignment_for(node)},
               {"stop", stop_},
               {"struck", struck_elsewhere(node.life)}};
  json answer = node.sent;
  answer["events"] = node.events;
  node.sent["assignment"].erase("acknowledged");
  return answer;
}

void CoordinatorService::push() {
  for (auto& [rank, node] : nodes_) {
    if (node.life < 0 || node.lost || node.request == 0) continue;
    const json before = node.sent;
    const json answer = answer_for(node);
    if (node.sent != before) options_.server->push(node.peer, node.request, answer);
  }
}

// --- Deciding ---

void CoordinatorService::take(const NodeReport& report, Clock::time_point now) {
  coordinator_->take(report, steady(now));
  changed_ = true;
}

void CoordinatorService::says(int rank, const json& event, Clock::time_point now) {
  recoveries_.says(rank, event, now);
}

Assignment CoordinatorService::decide(Clock::time_point now) {
  // While this process stood still, it heard nobody: they are not to blame.
  if (options_.nodes > 1 && now - looked_ > options_.policy.node_timeout / 2)
    stalled_ += now - looked_;
  looked_ = now;
  changed_ = false;
  const bool all_finished =
      finished_ && std::ranges::all_of(nodes_, [](const auto& entry) {
        return entry.second.finished || entry.second.lost || entry.second.life < 0;
      });
  if (all_finished && !ended_) end(true, "all workers finished");
  const GenerationPtr before = coordinator_->generation();
  const Decision decision = coordinator_->decide(steady(now));
  for (const Decision::Loss& loss : decision.lost) recoveries_.lost(loss.rank, loss.cause, now);
  for (const Decision::LostNode& lost : decision.lost_nodes) {
    if (const auto node = nodes_.find(lost.node % options_.nodes); node != nodes_.end())
      node->second.lost = true;
    lost_nodes_.push_back(lost.cause);
    for (std::size_t rank = 0; before && rank < before->members.size(); ++rank)
      if (const Member& member = before->members[rank]; member.node == lost.node)
        emit_({{"event", "worker"},
               {"seat", member.seat},
               {"node", member.node % options_.nodes},
               {"rank", rank},
               {"pid", member.pid},
               {"state", "ended"},
               {"cause", lost.cause},
               {"clock", clock_of(now)}});
  }
  ended_ |= decision.end.has_value();
  again_ = decision.again ? Deadline::at(*decision.again + stalled_) : Deadline::never();
  if (options_.nodes > 1 && again_.remaining() > kLook) again_ = Deadline::after(kLook);
  if (decision.published) {
    json ranks = json::array();
    for (const Member& member : decision.published->members) {
      ranks.push_back({{"rank", ranks.size()}, {"seat", member.seat}, {"pid", member.pid}});
      if (options_.nodes > 1) ranks.back()["node"] = member.node % options_.nodes;
    }
    recoveries_.published(decision.published);
    emit_({{"event", "generation"},
           {"generation", decision.published->number},
           {"ranks", std::move(ranks)},
           {"reason", decision.published->reason},
           {"clock", clock_of(now)}});
  }
  if (options_.nodes > 1) push();
  return coordinator_->assignment(kThisNode);
}

void CoordinatorService::scale(int workers) {
  if (!coordinator_) throw Error("the job waits for nodes");
  coordinator_->scale(workers);
  changed_ = true;
}

void CoordinatorService::stop() { stop_ = changed_ = true; }

void CoordinatorService::struck(const json& injected, int life) {
  if (struck_.size() < kMaxFaults) struck_.emplace_back(life, injected.value("fault", ""));
}

std::vector<std::string> CoordinatorService::struck_elsewhere(int life) const {
  std::vector<std::string> faults;
  for (const auto& [where, fault] : struck_)
    if (where != life) faults.push_back(fault);
  return faults;
}

void CoordinatorService::end(bool ok, const std::string& reason) {
  ended_ = changed_ = true;
  if (coordinator_) coordinator_->end(ok, reason);
}

bool CoordinatorService::all_know() const {
  return std::ranges::all_of(nodes_, [](const auto& entry) {
    return entry.second.left || entry.second.lost || entry.second.life < 0;
  });
}

JobStatus CoordinatorService::status() const {
  JobStatus status{.wanted = coordinator_ ? coordinator_->aimed() : options_.self.workers,
                   .least = welcome_ ? welcome_->least : options_.self.least,
                   .most = welcome_ ? welcome_->most : options_.self.workers,
                   .first_step = recoveries_.first_step(),
                   .step = recoveries_.step()};
  if (const GenerationPtr generation = this->generation()) {
    status.workers = static_cast<int>(generation->members.size());
    status.generation = generation->number;
    status.reason = generation->reason;
  }
  return status;
}

}  // namespace lockstep
