// Thousands of random histories of a job, each from its seed: workers that die, freeze and leave,
// nodes that are cut off, messages that are lost, doubled and late, coordinators that start anew.
// Whatever happens, steps are whole, weights are right, and the job ends.
//
// LOCKSTEP_SEED=n replays one history and prints it; LOCKSTEP_HISTORIES=n runs so many.
#include "lockstep/cluster/membership_simulation_test.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "lockstep/cluster/membership_simulation_models_test.h"
#include "lockstep/cluster/membership_wire.h"

namespace lockstep::simulation {

// --- Inside a worker ---

std::vector<std::uint64_t> Simulation::meet(Worker& worker, std::uint64_t word) {
  if (std::exchange(worker.fails_next_meeting, false)) throw GroupFailed{.over = false};
  const std::uint64_t number = worker.generation->number;
  worker.said[number].push_back(word);
  const std::size_t meeting = worker.said[number].size();
  const Node& node = nodes_.at(worker.node);
  const auto is_over = [&node, number] { return node.over > number; };
  const auto all_came = [&worker, number, meeting] {
    return std::all_of(worker.group.begin(), worker.group.end(),
                       [&](Worker* other) { return other->said[number].size() >= meeting; });
  };
  wait(worker, [=] { return all_came() || is_over(); });
  if (!all_came()) throw GroupFailed{.over = true};
  std::vector<std::uint64_t> words;
  for (const Worker* const other : worker.group)
    words.push_back(other->said.at(number)[meeting - 1]);
  return words;
}

void Simulation::check_alone(const Worker& worker) {
  for (const auto& other : workers_)
    if (other->alive && other->generation && !other->has_done_its_part &&
        other->generation->number < worker.generation->number &&
        std::find(worker.group.begin(), worker.group.end(), other.get()) == worker.group.end())
      throw Violation(fmt::format("generation {} recovers while worker {}.{} may be at work in {}",
                                  worker.generation->number, other->node, other->incarnation,
                                  other->generation->number));
}

void Simulation::committed(Worker& worker, std::uint64_t step) {
  const std::uint64_t number = worker.generation->number;
  if (number < newest_to_commit_)
    throw Violation(fmt::format("generation {} commits step {} after generation {} has committed",
                                number, step, newest_to_commit_));
  newest_to_commit_ = number;
  if (worker.rank != 0) return;
  log("  step {} committed in generation {}", step, number);
  later(up_to(3) * 1ms, [this, id = worker.node, step, number] {
    nodes_.at(id).roster.committed(step, number);
    report(id);
  });
}

bool Simulation::enter(Worker& worker, bool failed) {
  const Node& node = nodes_.at(worker.node);
  const bool was_member = worker.generation != nullptr;
  const std::uint64_t seen = was_member ? worker.generation->number + 1 : 0;
  // After a failure only a generation that ends the old one will do: a planned one may leave out
  // somebody who is still at work in it.
  GenerationPtr looked_at;
  for (;;) {
    wait(worker, [&] {
      return node.published && node.published != looked_at && node.published->number >= seen &&
             node.published->number >= node.over && (!failed || node.over >= seen);
    });
    looked_at = node.published;
    const auto& members = looked_at->members;
    const auto self = std::find_if(members.begin(), members.end(), [&](const Member& member) {
      return member.node == worker.node && member.incarnation == worker.incarnation;
    });
    if (self == members.end()) {
      if (was_member) return false;
      continue;
    }
    worker.generation = looked_at;
    worker.rank = static_cast<std::size_t>(self - members.begin());
    worker.group.clear();
    for (const Member& member : members)
      worker.group.push_back(by_name_.at({member.node, member.incarnation}));
    return true;
  }
}

void Simulation::work(Worker& worker, Model& model) {
  const Clock::time_point loaded = now_ + (5 + up_to(up_to(10) == 0 ? 400 : 60)) * 1ms;
  wait(worker, [=, this] { return now_ >= loaded; });
  later(up_to(3) * 1ms, [this, id = worker.node, incarnation = worker.incarnation] {
    nodes_.at(id).roster.ready(incarnation);
    report(id);
  });
  for (bool failed = false; enter(worker, failed);) {
    try {
      model.recover(worker);
      failed = false;
      std::uint64_t agreed = worker.generation->number;
      while (model.committed(worker.node) < setup_.goal && agreed == worker.generation->number)
        agreed = model.step(worker);
      if (model.committed(worker.node) < setup_.goal) continue;
      meet(worker);
      return;
    } catch (const GroupFailed& failure) {
      failed = true;
      if (failure.over) continue;
      log("  worker {}.{} reports a failed group", worker.node, worker.incarnation);
      later(up_to(3) * 1ms, [this, id = worker.node, incarnation = worker.incarnation,
                             number = worker.generation->number] {
        nodes_.at(id).roster.comm_error(incarnation, number, "an injected failure");
        report(id);
      });
    }
  }
}

// --- Nodes and the network ---

void Simulation::start(int id, int seat) {
  Node& node = nodes_.at(id);
  auto worker = std::make_unique<Worker>(
      Worker{.node = id, .seat = seat, .incarnation = node.roster.started(seat, next_pid_++)});
  log("  worker {}.{} starts at seat {}", id, worker->incarnation, seat);
  worker->fiber = std::make_unique<Fiber>([this, raw = worker.get()] { work(*raw, *model_); });
  by_name_[{id, worker->incarnation}] = worker.get();
  workers_.push_back(std::move(worker));
}

// The kernel ends it; the agent learns of it.
void Simulation::kill(Worker& worker, const std::string& cause) {
  if (!worker.alive) return;
  worker.fiber->kill();
  worker.alive = false;
  later(up_to(4) * 1ms, [this, id = worker.node, incarnation = worker.incarnation, cause] {
    nodes_.at(id).roster.ended(incarnation, WorkerState::failed, cause);
    report(id);
  });
}

void Simulation::send(int id, std::function<void()> what) {
  if (setup_.nodes == 1) {
    what();
    return;
  }
  if (nodes_.at(id).cut_until > now_ || chance(setup_.loss)) return;
  for (int copies = chance(setup_.loss) ? 2 : 1; copies > 0; --copies) {
    const bool strays = setup_.loss > 0 && chance(0.03);
    later(strays ? up_to(800) * 1ms : up_to(static_cast<std::uint64_t>(setup_.delay / 1ms)) * 1ms,
          what);
  }
}

namespace {

// As it arrives at another node.
template <typename Message, typename Read>
Message carried(const Message& message, Read read) {
  return read(nlohmann::json::parse(to_json(message).dump()));
}

}  // namespace

void Simulation::report(int id) {
  Node& node = nodes_.at(id);
  if (!node.alive) return;
  node.report_at = now_ + 15ms;
  send(id, [this, id, report = carried(node.roster.report(now_), node_report_from)] {
    if (!coordinator_) return;
    coordinator_->take(report, now_);
    decide();
    answer(id);
  });
}

void Simulation::answer(int id) {
  send(id, [this, id, assignment = carried(coordinator_->assignment(id), assignment_from)] {
    Node& node = nodes_.at(id);
    if (node.alive) execute(id, node.roster.follow(assignment));
  });
}

void Simulation::decide() {
  const Decision decision = coordinator_->decide(now_);
  again_ = decision.again;
  for (const std::string& reason : decision.reasons) log("{}", reason);
  if (decision.published) {
    ++generations;
    check_fenced(*decision.published);
    for (const auto& [id, node] : nodes_)
      if (node.alive) later(0ms, [this, id = id] { report(id); });
  }
  if (decision.end) end_ = decision.end;
}

void Simulation::execute(int id, const NodePlan& plan) {
  Node& node = nodes_.at(id);
  node.over = std::max(node.over, plan.over);
  if (plan.publish) node.published = plan.publish;
  for (const std::uint64_t killed : plan.kill)
    later(up_to(20) * 1ms, [this, killed = by_name_.at({id, killed})] { kill(*killed, "killed"); });
  for (const int seat : plan.reset) model_->reset_seat(id, seat);
  for (const int seat : plan.start) start(id, seat);
}

// At once: nobody who does not take part may still be at work.
void Simulation::check_fenced(const JobGeneration& next) {
  if (!next.at_once()) return;
  for (const auto& worker : workers_) {
    if (!worker->alive || !worker->generation || worker->fiber->done()) continue;
    const bool listed = std::any_of(next.members.begin(), next.members.end(), [&](const Member& m) {
      return m.node == worker->node && m.incarnation == worker->incarnation;
    });
    if (!listed)
      throw Violation(fmt::format("generation {} is published while worker {}.{} is at work in {}",
                                  next.number, worker->node, worker->incarnation,
                                  worker->generation->number));
  }
}

// --- Time, and what goes wrong ---

Worker* Simulation::any_worker() {
  std::vector<Worker*> alive;
  for (const auto& worker : workers_)
    if (worker->alive) alive.push_back(worker.get());
  return alive.empty() ? nullptr : alive[up_to(alive.size() - 1)];
}

void Simulation::fault() {
  last_fault_ = now_;
  Worker* const worker = any_worker();
  if (worker == nullptr) return;
  const std::uint64_t dice = up_to(setup_.nodes > 1 ? 14 : 10);
  Node& node = nodes_.at(worker->node);
  if (dice <= 4) {
    log("! worker {}.{} is killed", worker->node, worker->incarnation);
    ++kills;
    kill(*worker, "killed by signal 9 (SIGKILL)");
  } else if (dice <= 6) {
    log("! worker {}.{} freezes", worker->node, worker->incarnation);
    ++freezes;
    worker->frozen_since = now_;
    worker->frozen_until = now_ + up_to(400) * 1ms;
  } else if (dice == 7) {
    const int least = setup_.policy.least;
    const int to =
        least + static_cast<int>(up_to(static_cast<std::uint64_t>(setup_.policy.most - least)));
    log("! scale to {}", to);
    if (coordinator_) coordinator_->scale(to);
    if (coordinator_) decide();
  } else if (dice == 8 && failures_left_-- > 0) {
    log("! worker {}.{}: its group will fail", worker->node, worker->incarnation);
    worker->fails_next_meeting = true;
  } else if ((dice == 9 || dice == 14) && setup_.coordinator_restarts && coordinator_) {
    log("! the coordinator ends");
    coordinator_ = nullptr;
    again_ = std::nullopt;
    later(up_to(300) * 1ms, [this] {
      log("! another coordinator starts");
      coordinator_ = std::make_unique<Coordinator>(setup_.policy, now_, ++term_);
    });
  } else if (dice == 11 || dice == 12) {
    log("! node {} is cut off", worker->node);
    ++partitions;
    node.cut_until = now_ + up_to(600) * 1ms;
  } else if (dice == 13) {
    log("! node {} is gone, and another comes", worker->node);
    node.alive = false;
    for (const auto& other : workers_)
      if (other->node == worker->node) kill(*other, "");
    add_node();
  }
}

// The agents' eyes: a worker that stands still for 150 ms is killed, wherever it stands.
void Simulation::look_for_frozen() {
  for (std::size_t i = 0; i < workers_.size(); ++i) {  // more may start meanwhile
    Worker* const worker = workers_[i].get();
    if (!worker->alive || worker->frozen_until <= now_ || now_ < worker->frozen_since + 150ms)
      continue;
    Node& node = nodes_.at(worker->node);
    const WorkerReport* const known = node.roster.find(worker->incarnation);
    if (known == nullptr || !lives(known->state)) continue;
    node.roster.killing(worker->incarnation, "stood still for 0.15 s");
    report(worker->node);
    later(up_to(20) * 1ms, [this, worker] { kill(*worker, "killed"); });
  }
}

void Simulation::run_workers() {
  for (std::size_t i = 0; i < workers_.size(); ++i) {
    Worker& worker = *workers_[i];
    if (!worker.alive || worker.frozen_until > now_) continue;
    for (std::uint64_t budget = 1 + up_to(60); budget > 0 && !worker.fiber->done(); --budget) {
      if (worker.until && !worker.until()) break;
      worker.until = nullptr;
      worker.fiber->resume();
    }
    if (!worker.fiber->done()) continue;
    log("  worker {}.{} exits", worker.node, worker.incarnation);
    worker.alive = false;
    later(up_to(4) * 1ms, [this, id = worker.node, incarnation = worker.incarnation] {
      nodes_.at(id).roster.ended(incarnation, WorkerState::finished, "");
      report(id);
    });
  }
}

JobEnd Simulation::run(Model& model) {
  model_ = &model;
  for (; !end_; now_ += 1ms) {
    while (!events_.empty() && events_.begin()->first <= now_) {
      const auto what = std::move(events_.begin()->second);
      events_.erase(events_.begin());
      what();
    }
    while (!faults_.empty() && faults_.front() <= now_) {
      faults_.erase(faults_.begin());
      fault();
    }
    look_for_frozen();
    for (auto& [id, node] : nodes_) {
      if (!node.alive) continue;
      execute(id, node.roster.expire(now_));
      if (now_ >= node.report_at) report(id);
    }
    if (coordinator_ && again_ && now_ >= *again_) {
      decide();
      for (const auto& [id, node] : nodes_)
        if (node.alive) answer(id);
    }
    run_workers();
    if (now_ > last_fault_ + 10s) throw Violation("nothing gets on for 10 s after the last fault");
  }
  return *end_;
}

namespace {

Setup draw(std::uint64_t seed) {
  std::mt19937_64 random(seed ^ 0x5e7);
  const auto up_to = [&](int most) {
    return static_cast<int>(random() % (static_cast<std::uint64_t>(most) + 1));
  };
  Setup setup;
  setup.nodes = up_to(2) == 0 ? 2 + up_to(2) : 1;
  setup.policy = {.least = 1,
                  .most = 1 + up_to(3),
                  .standby = up_to(3) == 0 ? 1 : 0,
                  .max_restarts = up_to(9) == 0 ? up_to(2) : 1000,
                  .restart_window = 1s,
                  .comm_error_patience = 40ms,
                  .join_patience = 20ms,
                  .start_patience = 200ms,
                  .wait_patience = 2s};
  setup.policy.least = 1 + up_to(setup.policy.most - 1);
  if (setup.nodes > 1) setup.policy.node_timeout = 200ms;
  // A seat of a dead member is kept until the next commit.
  setup.seats = 2 * setup.policy.most + setup.policy.standby + 12;
  setup.goal = static_cast<std::uint64_t>(5 + up_to(7));
  setup.faults = up_to(setup.nodes > 1 ? 12 : 6);
  setup.loss = up_to(1) == 0 ? 0 : 0.1;
  setup.delay = up_to(20) * 1ms;
  setup.coordinator_restarts = up_to(1) == 0;
  return setup;
}

#ifdef __SANITIZE_ADDRESS__
constexpr std::uint64_t kHistories = 200;
#else
constexpr std::uint64_t kHistories = 3000;
#endif

struct Totals {
  int histories = 0, many_nodes = 0, kills = 0, freezes = 0, partitions = 0, generations = 0;
  int gave_up = 0;
};

void run_history(std::uint64_t seed, bool print, Totals& totals) {
  static const Work work(4);
  const Setup setup = draw(seed);
  Simulation simulation(seed, setup, print);
  std::unique_ptr<Model> model;
  if (setup.nodes == 1)
    model = std::make_unique<OneNode>(simulation, work);
  else
    model = std::make_unique<ManyNodes>(simulation, work);
  const JobEnd end = simulation.run(*model);
  // It may give up when there was a limit.
  const bool may_end = setup.policy.max_restarts < 1000 &&
                       end.reason.find("no restart is left") != std::string::npos;
  if (!end.ok && !may_end) throw Violation("the job has ended: " + end.reason);
  ++totals.histories;
  totals.many_nodes += setup.nodes > 1 ? 1 : 0;
  totals.kills += simulation.kills;
  totals.freezes += simulation.freezes;
  totals.partitions += simulation.partitions;
  totals.generations += simulation.generations;
  totals.gave_up += end.ok ? 0 : 1;
}

TEST(MembershipSimulation, WholeStepsAndTheRightBitsWhateverHappens) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "one thread, and fibers that the thread sanitizer does not know";
#endif
  Totals totals;
  if (const char* const one = std::getenv("LOCKSTEP_SEED")) {
    run_history(std::strtoull(one, nullptr, 10), true, totals);
    return;
  }
  const char* const asked = std::getenv("LOCKSTEP_HISTORIES");
  const std::uint64_t histories = asked != nullptr ? std::strtoull(asked, nullptr, 10) : kHistories;
  int failed = 0;
  for (std::uint64_t seed = 1; seed <= histories && failed < 5; ++seed) {
    try {
      run_history(seed, false, totals);
    } catch (const std::exception& failure) {
      ++failed;
      ADD_FAILURE() << "history " << seed << ": " << failure.what()
                    << "\nreplay: LOCKSTEP_SEED=" << seed
                    << " cluster_test --gtest_filter=MembershipSimulation.*";
    }
  }
  std::printf(
      "%d histories (%d of several nodes): %d kills, %d freezes, %d partitions, %d "
      "generations; %d used up their restarts\n",
      totals.histories, totals.many_nodes, totals.kills, totals.freezes, totals.partitions,
      totals.generations, totals.gave_up);
}

}  // namespace
}  // namespace lockstep::simulation
