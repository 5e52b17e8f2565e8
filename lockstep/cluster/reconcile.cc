#include "lockstep/cluster/reconcile.h"

#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"

namespace lockstep {

Roster::Roster(int node, int seats, Clock::duration lease, int most)
    : seats_(seats), most_(most), lease_(lease) {
  report_.node = node;
}

void Roster::introduce(int rank, std::string host) {
  report_.rank = rank;
  report_.host = std::move(host);
}

std::uint64_t Roster::started(int seat, int pid) {
  LOCKSTEP_CHECK(seat >= 0 && seat < seats_);
  for (const WorkerReport& worker : report_.workers) LOCKSTEP_CHECK(worker.seat != seat);
  const std::uint64_t incarnation = report_.started++;
  report_.workers.push_back({.seat = seat, .incarnation = incarnation, .pid = pid});
  return incarnation;
}

void Roster::runs(std::uint64_t incarnation, int pid) {
  if (WorkerReport* const worker = known(incarnation)) worker->pid = pid;
}

void Roster::ready(std::uint64_t incarnation, std::string address) {
  WorkerReport* const worker = known(incarnation);
  if (worker == nullptr || worker->state != WorkerState::starting) return;
  worker->state = WorkerState::ready;
  worker->address = std::move(address);
}

void Roster::killing(std::uint64_t incarnation, std::string cause) {
  WorkerReport* const worker = known(incarnation);
  if (worker == nullptr || !lives(worker->state)) return;
  worker->state = WorkerState::dying;
  worker->cause = std::move(cause);
}

void Roster::ended(std::uint64_t incarnation, WorkerState state, std::string cause,
                   bool failed_for_good) {
  WorkerReport* const worker = known(incarnation);
  if (worker == nullptr || lockstep::ended(worker->state)) return;
  if (worker->state != WorkerState::dying) worker->cause = std::move(cause);
  worker->state = state;
  worker->failed_for_good = failed_for_good;
}

void Roster::comm_error(std::uint64_t incarnation, std::uint64_t generation, std::string message) {
  WorkerReport* const worker = known(incarnation);
  if (worker == nullptr || (worker->comm_error && *worker->comm_error >= generation)) return;
  worker->comm_error = generation;
  worker->message = std::move(message);
}

void Roster::committed(std::uint64_t step, std::uint64_t generation) {
  report_.committed = std::max(report_.committed, step);
  report_.taken_up = std::max(report_.taken_up.value_or(0), generation);
}

void Roster::entered(std::uint64_t generation) { entered_ = std::max(entered_, generation); }

NodeReport Roster::report(Clock::time_point now) {
  ++report_.version;
  const auto living =
      std::ranges::count_if(report_.workers, [](auto& worker) { return lives(worker.state); });
  report_.room = std::max(0, std::min(seats_ - static_cast<int>(report_.workers.size()),
                                      most_ - static_cast<int>(living)));
  for (const WorkerReport& worker : report_.workers)
    if (lockstep::ended(worker.state)) told_.try_emplace(worker.incarnation, report_.version);
  if (lease_ != Clock::duration::max()) sent_.emplace_back(report_.version, now);
  return report_;
}

NodePlan Roster::follow(const Assignment& assignment) {
  NodePlan plan;
  plan.over = over_;
  // A coordinator that was replaced since: what it says is void.
  if (assignment.term < term_) return plan;
  term_ = assignment.term;
  acknowledged_ = std::max(acknowledged_, assignment.acknowledged);
  for (; !sent_.empty() && sent_.front().first <= acknowledged_; sent_.pop_front())
    lease_from_ = sent_.front().second;
  plan.end = assignment.end;
  // Told by rank 0, which may be another node's.
  if (assignment.taken_up)
    report_.taken_up = std::max(report_.taken_up.value_or(0), *assignment.taken_up);
  plan.over = over_ = std::max(over_, assignment.over);
  const GenerationPtr& next = assignment.generation;
  if (next && (!report_.generation || next->number > report_.generation->number)) {
    plan.publish = report_.generation = next;
    for (const Member& member : next->members)
      if (member.node == report_.node)
        for (WorkerReport& worker : report_.workers)
          if (worker.incarnation == member.incarnation) worker.listed = next->number;
  }
  for (WorkerReport& worker : report_.workers)
    if (lives(worker.state) && std::find(assignment.kill.begin(), assignment.kill.end(),
                                         worker.incarnation) != assignment.kill.end()) {
      killing(worker.incarnation, "not needed any more");
      plan.kill.push_back(worker.incarnation);
    }
  // The seat of a dead member holds its part of a step that may have been decided, until a
  // generation without it has made that whole, or committed a step.
  std::erase_if(report_.workers, [&](const WorkerReport& worker) {
    const std::uint64_t newest = std::max(entered_, report_.taken_up.value_or(0));
    const bool needed = worker.listed && newest <= *worker.listed;
    const auto told = told_.find(worker.incarnation);
    if (!lockstep::ended(worker.state) || needed || told == told_.end() ||
        told->second > acknowledged_)
      return false;
    plan.reset.push_back(worker.seat);
    told_.erase(told);
    return true;
  });
  std::vector<bool> taken(static_cast<std::size_t>(seats_));
  for (const WorkerReport& worker : report_.workers)
    taken[static_cast<std::size_t>(worker.seat)] = true;
  for (int seat = 0; seat < seats_ && !plan.end; ++seat)
    if (report_.started + plan.start.size() < assignment.start &&
        !taken[static_cast<std::size_t>(seat)])
      plan.start.push_back(seat);
  return plan;
}

NodePlan Roster::expire(Clock::time_point now) {
  NodePlan plan;
  plan.over = over_;
  if (lease_ == Clock::duration::max() || now < lease_from_ + lease_) return plan;
  for (const WorkerReport& worker : report_.workers)
    if (lives(worker.state)) plan.kill.push_back(worker.incarnation);
  for (const std::uint64_t incarnation : plan.kill)
    killing(incarnation,
            fmt::format("ended: no word from the coordinator for {:g} s", seconds(lease_)));
  return plan;
}

const WorkerReport* Roster::find(std::uint64_t incarnation) const {
  for (const WorkerReport& worker : report_.workers)
    if (worker.incarnation == incarnation) return &worker;
  return nullptr;
}

WorkerReport* Roster::known(std::uint64_t incarnation) {
  return const_cast<WorkerReport*>(find(incarnation));
}

std::optional<std::size_t> Roster::rank_of(std::uint64_t incarnation) const {
  if (!report_.generation) return std::nullopt;
  const auto& members = report_.generation->members;
  for (std::size_t rank = 0; rank < members.size(); ++rank)
    if (members[rank].node == report_.node && members[rank].incarnation == incarnation) return rank;
  return std::nullopt;
}

}  // namespace lockstep
