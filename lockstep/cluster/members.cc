#include "lockstep/cluster/members.h"

#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/cluster/recoveries.h"
#include "lockstep/collective/operation_record.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/generation_board.h"

namespace lockstep {
namespace {

bool in_a_call(Segment& segment, int seat) {
  const auto operations = recorded_operations(segment, seat);
  return !operations.empty() && operations.back().state == OperationState::open;
}

}  // namespace

NodeMembers::NodeMembers(const MembersOptions& options, std::shared_ptr<Segment> segment, Emit emit)
    : options_(options),
      segment_(std::move(segment)),
      emit_(std::move(emit)),
      roster_(options.welcome.node, segment_->seats(), options.welcome.lease,
              options.self.workers + options.standby),
      hangs_(options.hang_timeout) {
  roster_.introduce(options.self.rank, options.self.host);
  set_world_bounds(*segment_, {.least = options.welcome.least, .most = options.welcome.most});
}

// The first ones take the ranks in order, the others those that have become vacant.
std::uint64_t NodeMembers::start(int seat) {
  const std::uint64_t worker = roster_.started(seat, 0);
  int rank = -1;
  if (!began() && worker < static_cast<std::uint64_t>(options_.self.workers)) {
    rank = options_.welcome.first_rank + static_cast<int>(worker);
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
    const std::string address = event.value("address", "");
    if (address.size() > kMaxAddressBytes) throw Error("a worker's address is too long");
    roster_.ready(worker, address);
    tell(worker, "ready", "", now);
  } else if (name == "comm_error") {
    roster_.comm_error(worker, event.at("generation"), event.at("message"));
  } else if (name == "entered") {
    roster_.entered(event.at("generation"));
  } else if (name == "recovered") {
    step_ = event.at("step");
    roster_.committed(*step_, event.at("generation"));
  } else if (name == "step") {
    step_ = event.at("step");
    roster_.committed(*step_, 0);
  } else if (name == "first_step") {
    step_ = 1;
    roster_.committed(1, 0);
  } else {
    return;
  }
  changed_ = true;
}

void NodeMembers::ended(std::uint64_t worker, const Ending& ending, Clock::time_point now) {
  const bool finished = ending.signal == 0 && ending.code == 0;
  if (!finished && is_member(worker)) vacant_.push_back(rank_of(worker));
  roster_.ended(worker, finished ? WorkerState::finished : WorkerState::failed, ending.cause,
                ending.for_good);
  tell(worker, "ended", ending.cause, now);
  workers_.erase(worker);
  changed_ = true;
}

NodeReport NodeMembers::report(Clock::time_point now) {
  changed_ = false;
  return roster_.report(now);
}

NodeMembers::Steps NodeMembers::follow(const Assignment& assignment, Clock::time_point now) {
  const NodePlan plan = roster_.follow(assignment);
  if (plan.publish) {
    generation_ = plan.publish;
    publish(*generation_, now);
  }
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

bool NodeMembers::lease_is_over(Clock::time_point now) { return !roster_.expire(now).kill.empty(); }

// What another node's ranks are to this one's: where there are any.
void NodeMembers::list_nodes(const std::vector<Member>& members, Generation& board) const {
  for (std::size_t rank = 0; rank < members.size(); ++rank) {
    if (rank == 0 || members[rank].node != members[rank - 1].node) {
      if (is_here(members[rank])) board.node = static_cast<int>(board.local_sizes.size());
      board.local_sizes.push_back(0);
    }
    ++board.local_sizes.back();
    board.addresses.push_back(members[rank].address);
  }
  if (board.local_sizes.size() > 1) return;
  board.local_sizes.clear();
  board.addresses.clear();
}

// The last one: whoever comes later gets the first, and must not find himself in an old list.
int NodeMembers::free_seat() const {
  for (int seat = segment_->seats() - 1; seat >= 0; --seat)
    if (std::ranges::none_of(roster_.workers(), [&](auto& one) { return one.seat == seat; }))
      return seat;
  throw Error("every seat is taken");
}

void NodeMembers::publish(const JobGeneration& generation, Clock::time_point now) {
  Generation board;
  board.number = generation.number;
  board.reason = generation.reason;
  for (std::size_t rank = 0; rank < generation.members.size(); ++rank) {
    const Member& member = generation.members[rank];
    if (!is_here(member)) continue;
    // One may have ended that the coordinator does not know of yet.
    if (const auto found = workers_.find(member.incarnation); found != workers_.end())
      found->second.rank = static_cast<int>(rank);
    board.seats.push_back(member.seat);
  }
  // Who leaves learns it from a list that has somebody else.
  if (board.seats.empty())
    board.seats.push_back(free_seat());
  else
    list_nodes(generation.members, board);
  if (!workers_.empty()) lockstep::publish(*segment_, board, generation.at_once());
  if (options_.self.rank > 0)  // node 0 tells of it to whoever keeps account
    emit_({{"event", "generation"},
           {"generation", generation.number},
           {"reason", generation.reason},
           {"clock", clock_of(now)}});
  std::erase_if(vacant_, [&](int rank) { return rank < int(generation.members.size()); });
  for (const Member& member : generation.members)
    if (is_here(member) && workers_.contains(member.incarnation))
      tell(member.incarnation, "member", "", now);
}

std::vector<NodeMembers::Condemned> NodeMembers::look_for_hung(Clock::time_point now) {
  std::vector<Condemned> condemned;
  if (options_.start_timeout > Clock::duration::zero())
    for (const auto& [id, worker] : workers_)
      if (worker.pid != 0 && roster_.find(id)->state == WorkerState::starting &&
          now - options_.start_timeout >= worker.started)
        condemned.push_back(
            {id, fmt::format("hung: not ready after {:g} s", seconds(options_.start_timeout))});
  std::vector<HangWatch::Member> members;
  // Between two generations all wait for the next, however long a replacement takes.
  const bool between = generation_ && generations_over(*segment_) > generation_->number;
  if (options_.hang_timeout > Clock::duration::zero() && !between)
    for (const auto& [id, worker] : workers_)
      if (may_work(id) && lives(roster_.find(id)->state))
        members.push_back({id, sight_of(*segment_, worker.seat)});
  for (const HangWatch::Hung& hung : hangs_.look(members, now)) {
    const std::string stop = stopping_signal(workers_.at(hung.id).pid);
    // It may wait for another node, which this one cannot see.
    if (options_.welcome.nodes > 1 && stop.empty() &&
        in_a_call(*segment_, workers_.at(hung.id).seat))
      continue;
    condemned.push_back(
        {hung.id, fmt::format("hung: no progress for {:.1f} s{}{}", seconds(hung.since),
                              step_ ? fmt::format(" after step {}", *step_) : "",
                              stop.empty() ? "" : ", stopped by " + stop)});
  }
  for (const Condemned& one : condemned) roster_.killing(one.worker, one.cause);
  changed_ = changed_ || !condemned.empty();
  return condemned;
}

int NodeMembers::rank_of(std::uint64_t worker) const {
  const auto found = workers_.find(worker);
  return found == workers_.end() ? -1 : found->second.rank;
}

bool NodeMembers::may_work(std::uint64_t worker) const {
  return is_member(worker) ||
         (generation_ && std::ranges::any_of(generation_->leaving, [&](const Member& one) {
            return is_here(one) && one.incarnation == worker;
          }));
}

void NodeMembers::tell(std::uint64_t worker, const char* state, const std::string& cause,
                       Clock::time_point now) {
  const Worker& one = workers_.at(worker);
  nlohmann::json event{{"event", "worker"},     {"seat", one.seat}, {"rank", one.rank},
                       {"pid", one.pid},        {"state", state},   {"cause", cause},
                       {"clock", clock_of(now)}};
  if (options_.welcome.nodes > 1) event["node"] = options_.self.rank;
  emit_(event);
}

}  // namespace lockstep
