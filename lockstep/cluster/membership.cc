#include "lockstep/cluster/membership.h"

#include <fmt/format.h>

#include <algorithm>
#include <queue>

#include "lockstep/base/error.h"
#include "lockstep/cluster/membership_machine.h"

namespace lockstep {
namespace {

std::string all_of(const std::vector<std::string>& words) {
  constexpr std::size_t kNamed = 4;
  std::string text;
  for (std::size_t i = 0; i < std::min(words.size(), kNamed); ++i)
    text += (i == 0 ? "" : "; ") + words[i];
  if (words.size() > kNamed) text += fmt::format("; and {} more", words.size() - kNamed);
  return text;
}

}  // namespace

// --- Starting and ending workers ---

std::size_t Coordinator::Machine::restarts_left(Clock::time_point now) {
  while (!restarts_.empty() && restarts_.front() + policy_.restart_window <= now)
    restarts_.pop_front();
  const auto most = static_cast<std::size_t>(policy_.max_restarts);
  return most - std::min(most, restarts_.size());
}

std::string Coordinator::Machine::restarts_in_words() const {
  return fmt::format("{} of {} restarts in {}", restarts_.size(), policy_.max_restarts,
                     in_seconds(policy_.restart_window));
}

// Workers in place of lost ones are limited; what a beginning or scale() needs is not.
void Coordinator::Machine::order_starts(Tally& tally, Clock::time_point now) {
  starts_.clear();
  const std::size_t need =
      target(tally) + (finishing_ ? 0 : static_cast<std::size_t>(policy_.standby));
  // Who is leaving is kept if somebody is lost; members that are too many leave by themselves.
  const std::size_t members =
      std::min(target(tally), tally.lost || is_over() ? tally.survivors() : tally.staying.size());
  const std::size_t have = members + tally.waiting.size() + tally.starting;
  if (have >= need) {
    losses_ = 0;
    if (have > need && retire(tally, have - need)) tally = count();
    return;
  }
  const std::size_t missing = need - have;
  losses_ = std::min(losses_, missing);
  std::size_t room = 0;
  for (const auto& [id, node] : nodes_)
    if (!node.lost)
      room += static_cast<std::size_t>(
          std::max<std::int64_t>(0, node.report.room - static_cast<std::int64_t>(node.ordered())));
  const std::size_t left = hopeless_.empty() ? restarts_left(now) : 0;
  const std::size_t restarts = std::min({losses_, left, room});
  const std::size_t free = std::min(missing - losses_, room - restarts);
  losses_ -= restarts;
  restarts_.insert(restarts_.end(), restarts, now);
  place(restarts + free);
  tally.starting += restarts + free;
  if (restarts > 0) {
    denied_ = false;
    starts_ =
        restarts == 1 ? "a replacement starts" : fmt::format("{} replacements start", restarts);
    starts_ += fmt::format(" ({})", restarts_in_words());
  } else if (free > 0) {
    starts_ = count_of(free, "worker") + (free == 1 ? " starts" : " start");
  }
  if (losses_ > 0 && left == restarts && !denied_) {
    denied_ = true;
    starts_ += (starts_.empty() ? "" : ", ") +
               (hopeless_.empty() ? fmt::format("no more replacement: {}", restarts_in_words())
                                  : "no replacement: " + hopeless_);
  }
  if (losses_ > 0 && !restarts_.empty()) wake(restarts_.front() + policy_.restart_window);
}

// Where the fewest live.
void Coordinator::Machine::place(std::size_t workers) {
  if (workers == 0) return;
  struct Place {
    std::uint64_t living;
    Node* node;
    int id;
    bool operator<(const Place& other) const {
      return living != other.living ? living > other.living : id > other.id;
    }
  };
  std::priority_queue<Place> places;
  for (auto& [id, node] : nodes_) {
    std::uint64_t living = node.ordered();
    for (const auto& [incarnation, worker] : node.workers)
      living += lives(worker.report.state) ? 1 : 0;
    if (!node.lost) places.push({living, &node, id});
  }
  while (workers > 0 && !places.empty()) {
    Place place = places.top();
    places.pop();
    if (static_cast<std::int64_t>(place.node->ordered()) >= place.node->report.room) continue;
    ++place.node->start;
    ++place.living;
    --workers;
    places.push(place);
  }
}

// Who starts goes first, then who waits; the newest first.
bool Coordinator::Machine::retire(const Tally& tally, std::size_t surplus) {
  std::size_t retired = 0;
  for (const bool ready : {false, true})
    for (auto node = nodes_.rbegin(); node != nodes_.rend(); ++node)
      for (auto entry = node->second.workers.rbegin(); entry != node->second.workers.rend();
           ++entry) {
        Worker& worker = entry->second;
        if (retired == surplus || node->second.lost) break;
        if (!(ready ? worker.may_join() : worker.may_become_ready())) continue;
        worker.unneeded = true;
        ++retired;
      }
  if (retired > 0)
    tell(fmt::format("{} not needed any more: {} at work", count_of(retired, "worker"),
                     count_of(tally.staying.size(), "worker")));
  return retired > 0;
}

// --- Generations ---

Decision Coordinator::Machine::decide(Clock::time_point now) {
  decision_ = {};
  if (listening_ && (nodes_.empty() || now < listen_until_)) {
    if (now < listen_until_) wake(listen_until_);
    return decision_;
  }
  if (listening_) finish_listening();
  if (!end_) {
    lose_silent_nodes(now);
    account_for_the_lost();
  }
  Tally tally = count();
  if (!end_ && generation_ && tally.finished > 0 &&
      tally.finished + tally.gone == generation_->members.size())
    finish(true, "all workers finished");
  if (!end_) {
    order_starts(tally, now);
    if (!generation_)
      begin(tally, now);
    else if (tally.lost || is_over() ||
             (tally.finished > 0 && tally.survivors() > 0 && !taken_up()))
      go_on_without_the_lost(tally, now);
    else if (tally.failed_group != nullptr)
      begin_again(tally, now);
    else
      change_at_a_steps_end(tally, now);
    if (!asides_.empty()) {
      tell(all_of(asides_) + (starts_.empty() ? "" : ": " + starts_));
      starts_.clear();
    }
    asides_.clear();
    if (!starts_.empty()) tell(starts_);
  }
  decision_.end = end_;
  return std::move(decision_);
}

// Whether there are enough to begin with, or to go on with: otherwise the job waits, and says so,
// or ends when nobody can come.
bool Coordinator::Machine::wait_for_more(const Tally& tally, std::size_t floor,
                                         Clock::time_point now) {
  const std::size_t have = tally.survivors() + tally.waiting.size();
  if (!short_since_) short_since_ = now;
  if (have >= target(tally)) return false;
  if (have >= floor) {
    if (tally.starting == 0 || now >= *short_since_ + policy_.start_patience) return false;
    wake(*short_since_ + policy_.start_patience);
    return true;
  }
  if (tally.starting > 0) {
    nobody_since_ = std::nullopt;
    return true;
  }
  const std::string state =
      fmt::format("{} left and at least {} needed", count_of(have, "worker"), floor);
  const std::string cause = lost_.empty() ? state : all_of(lost_) + ": " + state;
  if (losses_ > 0 && (!hopeless_.empty() || restarts_left(now) == 0)) {
    finish(false, fmt::format("{}, but {}", cause,
                              hopeless_.empty() ? "no restart is left: " + restarts_in_words()
                                                : "to start another is pointless: " + hopeless_));
    starts_.clear();
    return true;
  }
  if (!nobody_since_) {
    nobody_since_ = now;
    if (!nodes_.empty()) tell(state + ", but no node has room for another: waiting");
  }
  if (now >= *nobody_since_ + policy_.wait_patience)
    finish(false, fmt::format("{}, and for {} no node had room for another", cause,
                              in_seconds(policy_.wait_patience)));
  else
    wake(*nobody_since_ + policy_.wait_patience);
  return true;
}

void Coordinator::Machine::begin(Tally& tally, Clock::time_point now) {
  if (wait_for_more(tally, floor(), now)) return;
  tally.waiting.resize(std::min(tally.waiting.size(), target(tally)));
  const std::size_t workers = tally.waiting.size();
  publish(std::move(tally.waiting), {}, true, fmt::format("{} begin", count_of(workers, "worker")));
}

void Coordinator::Machine::go_on_without_the_lost(Tally& tally, Clock::time_point now) {
  over_ = generation_->number + 1;
  const std::size_t least = floor();
  const bool enough = tally.survivors() >= least;
  // Nobody takes over the work of one who may still write.
  const bool wait = tally.dying || (!enough && wait_for_more(tally, least, now));
  if (end_) return;
  const std::string starts = starts_.empty() ? "" : "; " + starts_;
  if (!wait) {
    // Newcomers would wait for those who have finished.
    publish_survivors(tally, !lost_.empty()       ? all_of(lost_)
                             : tally.finished > 0 ? "others have finished"
                                                  : "who was to leave has left");
  } else if (news_) {
    tell(fmt::format("{}: {}{}", all_of(lost_),
                     tally.dying ? "waiting for the end of who is being killed"
                                 : fmt::format("{} left and at least {} needed, waiting",
                                               count_of(tally.survivors(), "worker"), least),
                     starts));
    starts_.clear();
  }
}

// The group failed under its members, but nobody is known to have died.
void Coordinator::Machine::begin_again(Tally& tally, Clock::time_point now) {
  if (!group_failed_since_) group_failed_since_ = now;
  const Clock::time_point patient_until = *group_failed_since_ + policy_.comm_error_patience;
  if (now < patient_until) {
    wake(patient_until);
    return;
  }
  const std::string cause = name(tally.failed_node, *tally.failed_group) +
                            " reported: " + tally.failed_group->report.message;
  if (group_failed_at_ == committed_) {
    finish(false, fmt::format("{}; for the second time after step {}, and nobody died", cause,
                              committed_));
  } else if (restarts_left(now) == 0) {
    finish(false,
           fmt::format("{}; nobody died, and no restart is left: {}", cause, restarts_in_words()));
  } else {
    restarts_.push_back(now);
    group_failed_at_ = committed_;
    publish_survivors(tally,
                      fmt::format("{}; nobody died within {} ({})", cause,
                                  in_seconds(policy_.comm_error_patience), restarts_in_words()));
  }
}

// At once: with everybody who may still be at work in an older generation, so that nobody goes on
// in it unnoticed; those that are too many leave at the end of a step.
std::string Coordinator::Machine::publish_survivors(Tally& tally, const std::string& cause) {
  std::vector<Member> members = std::move(tally.staying);
  members.insert(members.end(), tally.leaving.begin(), tally.leaving.end());
  const std::size_t survivors = members.size();
  for (const Member& newcomer : tally.waiting)
    if (members.size() < target(tally)) members.push_back(newcomer);
  const std::size_t newcomers = members.size() - survivors;
  std::string reason =
      fmt::format("{}: going on with {}{}{}", cause, count_of(members.size(), "worker"),
                  newcomers > 0 ? fmt::format(", {} of them new", newcomers) : "",
                  starts_.empty() ? "" : "; " + starts_);
  starts_.clear();
  publish(std::move(members), {}, true, reason);
  for (const Member& member : tally.leaving) find(member)->may_go = true;
  return reason;
}

void Coordinator::Machine::change_at_a_steps_end(Tally& tally, Clock::time_point now) {
  if (!taken_up() || finishing_) return;
  const auto aimed = static_cast<std::size_t>(aimed_);
  const std::size_t members = tally.staying.size();
  if (members > aimed) {
    const auto first = tally.staying.begin() + static_cast<std::ptrdiff_t>(aimed);
    const std::size_t leaving = members - aimed;
    publish({tally.staying.begin(), first}, {first, tally.staying.end()}, false,
            fmt::format("{}: {} at the end of a step", scaled_,
                        leaving == 1 ? "the last rank leaves"
                                     : fmt::format("the last {} ranks leave", leaving)));
    return;
  }
  if (members == aimed || tally.waiting.empty()) {
    joining_since_ = std::nullopt;
    return;
  }
  if (!joining_since_) joining_since_ = now;
  const Clock::time_point patient_until = *joining_since_ + policy_.join_patience;
  if (members + tally.waiting.size() < aimed && tally.starting > 0 && now < patient_until) {
    wake(patient_until);
    return;
  }
  tally.waiting.resize(std::min(tally.waiting.size(), aimed - members));
  const std::size_t joining = tally.waiting.size();
  tally.staying.insert(tally.staying.end(), tally.waiting.begin(), tally.waiting.end());
  publish(std::move(tally.staying), {}, false,
          fmt::format("{} {} at the end of a step: going on with {}", count_of(joining, "worker"),
                      joining == 1 ? "joins" : "join", count_of(members + joining, "worker")));
}

void Coordinator::Machine::publish(std::vector<Member> members, std::vector<Member> leaving,
                                   bool at_once, std::string reason) {
  JobGeneration next{.number = generation_ ? generation_->number + 1 + numbers_left_out_ : 0,
                     .members = std::move(members),
                     .leaving = std::move(leaving),
                     .over = 0,
                     .reason = std::move(reason)};
  // The ranks of a node follow one another, whoever came first.
  std::ranges::stable_sort(next.members, {}, &Member::node);
  for (Member& member : next.members)
    if (const Worker* const worker = find(member)) {
      member.pid = worker->report.pid;
      member.address = worker->report.address;
    }
  numbers_left_out_ = 0;
  if (at_once) over_ = next.number;
  next.over = over_;
  if (generation_)
    for (const auto* list : {&generation_->members, &generation_->leaving})
      for (const Member& member : *list)
        if (Worker* const worker = find(member)) worker->rank = -1, worker->leaving = false;
  generation_ = std::make_shared<const JobGeneration>(std::move(next));
  set_ranks();
  lost_.clear();
  short_since_ = nobody_since_ = joining_since_ = group_failed_since_ = std::nullopt;
  decision_.published = generation_;
  tell(generation_->reason);
}

void Coordinator::Machine::scale(int workers) {
  if (workers < policy_.least || workers > policy_.most)
    throw ConfigError(fmt::format("cannot scale to {} workers: the job takes {} to {}", workers,
                                  policy_.least, policy_.most),
                      fmt::format("start it with --workers {}:{}", std::min(workers, policy_.least),
                                  std::max(workers, policy_.most)));
  scaled_ = fmt::format("scaled from {} to {}", aimed_,
                        count_of(static_cast<std::size_t>(workers), "worker"));
  aimed_ = workers;
}

// --- Coordinator ---

Coordinator::Coordinator(const Policy& policy, Clock::time_point now, std::uint64_t term) {
  if (policy.least < 1 || policy.most < policy.least)
    throw ConfigError(fmt::format("{}:{} is no range of workers", policy.least, policy.most),
                      "MIN:MAX, MIN at least 1 and MAX at least MIN");
  if (policy.standby < 0 || policy.max_restarts < 0)
    throw ConfigError("the numbers of standby workers and of restarts cannot be negative");
  machine_ = std::make_unique<Machine>(policy, now, term);
}
Coordinator::~Coordinator() = default;
void Coordinator::take(const NodeReport& report, Clock::time_point now) {
  machine_->take(report, now);
}
void Coordinator::scale(int workers) { machine_->scale(workers); }
void Coordinator::disconnected(int node, Clock::time_point now) {
  machine_->disconnected(node, now);
}
void Coordinator::end(bool ok, const std::string& reason) { machine_->end(ok, reason); }
Decision Coordinator::decide(Clock::time_point now) { return machine_->decide(now); }
Assignment Coordinator::assignment(int node) const { return machine_->assignment(node); }
int Coordinator::aimed() const { return machine_->aimed(); }
GenerationPtr Coordinator::generation() const { return machine_->generation(); }

}  // namespace lockstep
