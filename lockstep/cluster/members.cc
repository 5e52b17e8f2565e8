#include "lockstep/cluster/members.h"

#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/generation_board.h"

namespace lockstep {
namespace {

constexpr int kThisNode = 0;
constexpr auto kRejoinPatience = std::chrono::seconds(10);

double clock_of(Clock::time_point when) { return seconds(when.time_since_epoch()); }

}  // namespace

NodeMembers::NodeMembers(const MembersOptions& options, std::shared_ptr<Segment> segment, Emit emit,
                         Clock::time_point now)
    : options_(options),
      segment_(std::move(segment)),
      emit_(std::move(emit)),
      coordinator_(options.policy, now),
      roster_(kThisNode, segment_->seats()),
      hangs_(options.hang_timeout) {
  set_world_bounds(*segment_, {.least = options.policy.least, .most = options.policy.most});
}

// The first ones take the ranks in order, the others those that have become vacant.
std::uint64_t NodeMembers::start(int seat) {
  const std::uint64_t worker = roster_.started(seat, 0);
  int rank = -1;
  if (!began() && worker < static_cast<std::uint64_t>(options_.policy.most)) {
    rank = static_cast<int>(worker);
  } else if (!vacant_.empty()) {
    rank = vacant_.front();
    vacant_.erase(vacant_.begin());
  }
  workers_[worker] = {.seat = seat, .rank = rank};
  changed_ = true;
  return worker;
}

void NodeMembers::runs(std::uint64_t worker, int pid, Clock::time_point now) {
  workers_.at(worker).pid = pid;
  workers_.at(worker).started = now;
  roster_.runs(worker, pid);
  tell(worker, "starting", "", now);
  changed_ = true;
}

void NodeMembers::says(std::uint64_t worker, const nlohmann::json& event, Clock::time_point now) {
  if (!workers_.contains(worker)) return;  // what a child of it goes on writing
  const std::string& name = event.at("event").get_ref<const std::string&>();
  if (name == "join") {
    roster_.ready(worker);
    tell(worker, "ready", "", now);
  } else if (name == "comm_error") {
    const std::uint64_t generation = event.at("generation");
    roster_.comm_error(worker, generation, event.at("message"));
    if (began() && generation == coordinator_.generation()->number &&
        (failure_.rank < 0 || failure_.generation < generation))
      failure_ = loss_of(worker, event.at("message"), now);
  } else if (name == "entered") {
    roster_.entered(event.at("generation"));
  } else if (name == "recovered") {
    recovered(event);
  } else if (name == "step") {
    step_ = event.at("step");
    roster_.committed(*step_, 0);
  } else if (name == "first_step") {
    step_ = first_step_ = 1;
    roster_.committed(1, 0);
  } else {
    return;
  }
  changed_ = true;
}

void NodeMembers::ended(std::uint64_t worker, const Ending& ending, Clock::time_point now) {
  const bool finished = ending.signal == 0 && ending.code == 0;
  if (!finished && is_member(worker)) {
    losses_.push_back(loss_of(worker, ending.cause, now));
    vacant_.push_back(rank_of(worker));
  }
  roster_.ended(worker, finished ? WorkerState::finished : WorkerState::failed, ending.cause,
                ending.for_good);
  tell(worker, "ended", ending.cause, now);
  workers_.erase(worker);
  changed_ = true;
}

NodeMembers::Steps NodeMembers::decide(Clock::time_point now) {
  changed_ = false;
  again_ = Deadline::never();
  coordinator_.take(roster_.report(now), now);
  const Decision decision = coordinator_.decide(now);
  if (decision.again) again_ = Deadline::at(*decision.again);
  const NodePlan plan = roster_.follow(coordinator_.assignment(kThisNode));
  if (plan.publish) publish(*plan.publish, now);
  if (plan.over > generations_over(*segment_)) {
    segment_->board().over.store(plan.over);
    segment_->wake_all();
  }
  Steps steps{.kill = {}, .start = plan.start, .end = plan.end};
  for (const std::uint64_t worker : plan.kill)
    steps.kill.push_back({worker, roster_.find(worker)->cause});
  for (const int seat : plan.reset) segment_->reset(seat);
  // What was published or is known as ended now may lead to more.
  changed_ = changed_ || plan.publish || !plan.kill.empty() || !plan.reset.empty();
  return steps;
}

NodeMembers::Loss NodeMembers::loss_of(std::uint64_t worker, std::string cause,
                                       Clock::time_point now) const {
  const JobGeneration& generation = *coordinator_.generation();
  return {.rank = rank_of(worker),
          .cause = std::move(cause),
          .clock = clock_of(now),
          .generation = generation.number,
          .members = generation.members.size(),
          .recovery = nullptr};
}

void NodeMembers::publish(const JobGeneration& generation, Clock::time_point now) {
  Generation board{.number = generation.number, .seats = {}, .reason = generation.reason};
  nlohmann::json ranks = nlohmann::json::array();
  for (const Member& member : generation.members) {
    Worker& worker = workers_.at(member.incarnation);
    worker.rank = static_cast<int>(board.seats.size());
    ranks.push_back({{"rank", worker.rank}, {"seat", worker.seat}, {"pid", worker.pid}});
    board.seats.push_back(member.seat);
  }
  lockstep::publish(*segment_, board, generation.at_once());
  first_step_ = std::nullopt;
  // Nobody died, and yet all begin again.
  if (generation.at_once() && failure_.rank >= 0 && failure_.generation + 1 == generation.number &&
      std::ranges::none_of(losses_, [&](const Loss& loss) { return loss.recovery.is_null(); }))
    losses_.push_back(failure_);
  std::erase_if(vacant_, [&](int rank) { return rank < int(board.seats.size()); });
  emit_({{"event", "generation"},
         {"generation", generation.number},
         {"ranks", std::move(ranks)},
         {"reason", generation.reason},
         {"clock", clock_of(now)}});
  for (const Member& member : generation.members) tell(member.incarnation, "member", "", now);
}

void NodeMembers::recovered(const nlohmann::json& event) {
  const std::uint64_t generation = event.at("generation");
  const double clock = event.at("clock");
  roster_.committed(event.at("step"), generation);
  step_ = event.at("step");
  if (coordinator_.generation() && coordinator_.generation()->number == generation)
    first_step_ = step_;
  const std::size_t members =
      coordinator_.generation() ? coordinator_.generation()->members.size() : 0;
  for (Loss& loss : losses_) {
    if (generation <= loss.generation) continue;
    if (loss.recovery.is_null())
      loss.recovery = {{"event", "recovery"},          {"rank", loss.rank},
                       {"cause", loss.cause},          {"seconds", clock - loss.clock},
                       {"step", event.at("step")},     {"steps_redone", event.at("steps_redone")},
                       {"source", event.at("source")}, {"generation", generation},
                       {"rejoined_seconds", nullptr}};
    if (members >= loss.members && coordinator_.generation()->number == generation)
      loss.recovery["rejoined_seconds"] = clock - loss.clock;
  }
  tell_recoveries(Clock::time_point::min());
}

void NodeMembers::tell_recoveries(Clock::time_point now) {
  const auto told = [&](Loss& loss) {
    if (loss.recovery.is_null()) return false;
    const bool late =
        now == Clock::time_point::max() || clock_of(now) > loss.clock + seconds(kRejoinPatience);
    if (loss.recovery["rejoined_seconds"].is_null() && !late) return false;
    emit_(loss.recovery);
    return true;
  };
  std::erase_if(losses_, told);
}

std::vector<NodeMembers::Condemned> NodeMembers::look_for_hung(Clock::time_point now) {
  tell_recoveries(now);
  std::vector<Condemned> condemned;
  if (options_.start_timeout > Clock::duration::zero())
    for (const auto& [id, worker] : workers_)
      if (worker.pid != 0 && roster_.find(id)->state == WorkerState::starting &&
          now - options_.start_timeout >= worker.started)
        condemned.push_back(
            {id, fmt::format("hung: not ready after {:g} s", seconds(options_.start_timeout))});
  std::vector<HangWatch::Member> members;
  // Between two generations all wait for the next, however long a replacement takes.
  const GenerationPtr generation = coordinator_.generation();
  const bool between = generation && generations_over(*segment_) > generation->number;
  if (options_.hang_timeout > Clock::duration::zero() && !between)
    for (const auto& [id, worker] : workers_)
      if (may_work(id) && lives(roster_.find(id)->state))
        members.push_back({id, sight_of(*segment_, worker.seat)});
  for (const HangWatch::Hung& hung : hangs_.look(members, now)) {
    const std::string stop = stopping_signal(workers_.at(hung.id).pid);
    condemned.push_back(
        {hung.id, fmt::format("hung: no progress for {:.1f} s{}{}", seconds(hung.since),
                              step_ ? fmt::format(" after step {}", *step_) : "",
                              stop.empty() ? "" : ", stopped by " + stop)});
  }
  for (const Condemned& one : condemned) roster_.killing(one.worker, one.cause);
  changed_ = changed_ || !condemned.empty();
  return condemned;
}

JobStatus NodeMembers::status() const {
  JobStatus status{.wanted = coordinator_.aimed(),
                   .least = options_.policy.least,
                   .most = options_.policy.most,
                   .first_step = first_step_,
                   .step = step_};
  if (const GenerationPtr generation = coordinator_.generation()) {
    status.workers = static_cast<int>(generation->members.size());
    status.generation = generation->number;
    status.reason = generation->reason;
  }
  return status;
}

int NodeMembers::rank_of(std::uint64_t worker) const {
  const auto found = workers_.find(worker);
  return found == workers_.end() ? -1 : found->second.rank;
}

bool NodeMembers::may_work(std::uint64_t worker) const {
  const GenerationPtr generation = coordinator_.generation();
  return is_member(worker) ||
         (generation && std::ranges::any_of(generation->leaving,
                                            [&](auto& one) { return one.incarnation == worker; }));
}

void NodeMembers::tell(std::uint64_t worker, const char* state, const std::string& cause,
                       Clock::time_point now) {
  const Worker& one = workers_.at(worker);
  emit_({{"event", "worker"},
         {"seat", one.seat},
         {"rank", one.rank},
         {"pid", one.pid},
         {"state", state},
         {"cause", cause},
         {"clock", clock_of(now)}});
}

}  // namespace lockstep
