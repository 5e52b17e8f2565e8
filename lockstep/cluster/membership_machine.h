// The membership machine from inside: what it knows and its decisions' parts. Internal to
// cluster/membership*.cc; who owns what and threads: membership.h.
#pragma once

#include <deque>
#include <map>
#include <string_view>

#include "lockstep/cluster/membership.h"

namespace lockstep {

std::string count_of(std::size_t number, std::string_view what);  // "1 worker", "3 workers"
std::string in_seconds(Clock::duration duration);                 // "0.5 s"

class Coordinator::Machine {
 public:
  Machine(const Policy& policy, Clock::time_point now, std::uint64_t term)
      : policy_(policy), term_(term), aimed_(policy.most) {
    if (term > 0 && policy.node_timeout != Clock::duration::max())
      listen_until_ = now + policy.node_timeout;
    listening_ = term > 0;
  }

  void take(const NodeReport& report, Clock::time_point now);
  void scale(int workers);
  void disconnected(int node, Clock::time_point now);
  Decision decide(Clock::time_point now);
  Assignment assignment(int node) const;
  int aimed() const { return aimed_; }
  GenerationPtr generation() const { return generation_; }
  void end(bool ok, const std::string& reason) {
    if (!end_) end_ = {ok, reason};
  }

 private:
  struct Worker {
    WorkerReport report;
    std::uint64_t seen = 0;  // the version of the last report that has it
    int rank = -1;           // in the newest generation
    int last_rank = -1;
    bool was_member = false;  // never again, unless it is one
    bool was_ready = false;
    bool leaving = false;  // the newest generation drops it
    // It had been told to leave when others died: until that generation is taken up it may go yet,
    // and has then not finished the job.
    bool may_go = false;
    bool unneeded = false;   // to be killed
    bool accounted = false;  // that it is lost has been noticed

    bool may_join() const { return report.state == WorkerState::ready && !was_member && !unneeded; }
    bool may_become_ready() const {
      return report.state == WorkerState::starting && !was_member && !unneeded;
    }
  };
  struct Node {
    NodeReport report;  // its workers: below
    Clock::time_point heard;
    std::optional<Clock::time_point> closed;  // its agent's connection
    bool lost = false;
    std::uint64_t start = 0;
    std::map<std::uint64_t, Worker> workers;  // by incarnation

    std::uint64_t ordered() const { return start - std::min(start, report.started); }
  };
  // What the reports add up to.
  struct Tally {
    std::vector<Member> staying;  // members that live, by rank
    std::vector<Member> leaving;  // living ones that may still be at work in the generation before
    std::vector<Member> waiting;  // ready, and never a member
    std::size_t starting = 0;     // these, and who has been ordered
    std::size_t finished = 0;     // members
    std::size_t gone = 0;         // members that left, as they had been told
    bool lost = false;            // a member, or one that is leaving
    bool dying = false;           // likewise, and not fenced
    const Worker* failed_group = nullptr;  // of a living member: a comm_error
    int failed_node = 0;

    std::size_t survivors() const { return staying.size() + leaving.size(); }
  };

  void merge(Node& node, const WorkerReport& report, std::uint64_t version);
  void finish_listening();
  void lose_silent_nodes(Clock::time_point now);
  void account_for_the_lost();
  void account(int id, Worker& worker);
  Tally count();
  void order_starts(Tally& tally, Clock::time_point now);
  void place(std::size_t workers);
  bool retire(const Tally& tally, std::size_t need);
  void begin(Tally& tally, Clock::time_point now);
  void go_on_without_the_lost(Tally& tally, Clock::time_point now);
  void begin_again(Tally& tally, Clock::time_point now);
  void change_at_a_steps_end(Tally& tally, Clock::time_point now);
  bool wait_for_more(const Tally& tally, std::size_t floor, Clock::time_point now);
  void publish(std::vector<Member> members, std::vector<Member> leaving, bool at_once,
               std::string reason);
  std::string publish_survivors(Tally& tally, const std::string& cause);

  Worker* find(const Member& member);
  void set_ranks();
  bool taken_up() const { return taken_up_ && *taken_up_ >= generation_->number; }
  // Waits in it were ended: another must follow, also if who was to be killed finished instead.
  bool is_over() const { return generation_ && over_ > generation_->number; }
  std::size_t floor() const { return finishing_ ? 1 : static_cast<std::size_t>(policy_.least); }
  std::size_t target(const Tally& tally) const {
    return finishing_ ? std::max<std::size_t>(1, tally.staying.size())
                      : static_cast<std::size_t>(aimed_);
  }
  std::size_t restarts_left(Clock::time_point now);
  std::string restarts_in_words() const;
  std::string name(int node, const Worker& worker) const;
  std::string name(int node) const;  // "node 1"
  void tell(std::string reason) { decision_.reasons.push_back(std::move(reason)); }
  void wake(Clock::time_point when) {
    decision_.again = decision_.again ? std::min(*decision_.again, when) : when;
  }
  void finish(bool ok, const std::string& reason) {
    if (end_) return;
    end(ok, reason);
    tell(reason);
  }

  Policy policy_;
  std::uint64_t term_;
  int aimed_;
  std::map<int, Node> nodes_;
  GenerationPtr generation_;
  std::uint64_t over_ = 0;
  std::optional<std::uint64_t> taken_up_;
  std::uint64_t committed_ = 0;
  bool finishing_ = false;  // a member has finished: whoever is left finishes the rest
  std::optional<JobEnd> end_;
  bool listening_;  // for what the coordinator before has decided
  Clock::time_point listen_until_{};
  std::uint64_t numbers_left_out_ = 0;

  std::vector<std::string> lost_;    // in words: members lost since the last generation at once
  bool news_ = false;                // some of them are new
  std::vector<std::string> asides_;  // the same of others, new ones
  std::string starts_;               // in words: what was ordered in this decision
  std::string scaled_;               // in words
  std::string hopeless_;             // why no worker is replaced any more
  std::size_t losses_ = 0;           // not yet replaced
  bool denied_ = false;              // it was said that the restarts are used up
  std::deque<Clock::time_point> restarts_;
  std::optional<Clock::time_point> short_since_;   // too few, or too few yet
  std::optional<Clock::time_point> nobody_since_;  // and nobody comes
  std::optional<Clock::time_point> joining_since_;
  std::optional<Clock::time_point> group_failed_since_;
  std::optional<std::uint64_t> group_failed_at_;  // the committed step, the last time
  Decision decision_;                             // in the making
};

}  // namespace lockstep
