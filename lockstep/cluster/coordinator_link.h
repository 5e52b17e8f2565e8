// The way of an agent to the coordinator on another node: joins, reports, hands on its workers'
// events, takes assignments. Connects again by itself; nothing that was told is lost as long as
// this node is not given up.
//
// Owns a ControlClient. One thread; time is an argument.
#pragma once

#include <netinet/in.h>

#include <deque>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "lockstep/base/file.h"
#include "lockstep/cluster/control.h"
#include "lockstep/cluster/job_nodes.h"
#include "lockstep/cluster/membership.h"

namespace lockstep {

class CoordinatorLink {
 public:
  // Throws ConfigError, Error.
  CoordinatorLink(const ControlTarget& target, NodeIntroduction self, Clock::time_point now);

  int fd() const { return epoll_.get(); }  // readable: call receive()
  // What this node was is over: joins anew. Events that were not taken are dropped.
  void join_again(Clock::time_point now);
  bool joined() const { return life_ >= 0; }

  void tell(int rank, const nlohmann::json& event);
  void stop() { stop_ = changed_ = true; }          // asks for the job's
  void finished() { finished_ = changed_ = true; }  // all workers have ended well, as no members
  // The newest report; sent now, and again until the next. `left`: the last one.
  void report(const NodeReport& report, Clock::time_point now, bool left = false);
  bool left() const { return left_taken_; }  // and the coordinator knows, or is no more

  struct News {
    std::optional<NodeWelcome> welcome;
    std::optional<Assignment> assignment;
    std::string waiting;              // for what; new
    bool stop = false;                // the step under way is to be the last
    bool unknown = false;             // the coordinator has given this node up
    bool ended = false;               // the job has, before this node could join
    std::vector<std::string> struck;  // the faults that have, on other nodes
  };
  // Sends what is due. Throws ConfigError: this node is refused. CommError: another key; nobody is
  // there (any more), in words.
  News receive(Clock::time_point now);
  bool changed() const { return changed_; }
  Deadline again() const { return again_; }

 private:
  void connect();
  void send(Clock::time_point now);
  void take(const ControlReply& reply, News& news);
  void check_patience(Clock::time_point now);

  ControlTarget target_;
  NodeIntroduction self_;
  UniqueFd epoll_;
  std::unique_ptr<ControlClient> client_;
  std::uint64_t last_id_ = 0, first_id_ = 0;  // first: of this life
  int life_ = -1;
  nlohmann::json report_;  // null: none yet
  std::uint64_t published_ = 0;
  std::deque<nlohmann::json> events_;  // not yet taken
  std::uint64_t first_event_ = 0;      // number of the first of these
  bool stop_ = false, finished_ = false, changed_ = true;
  bool leaving_ = false, left_taken_ = false;
  std::uint64_t left_id_ = 0;  // the first request that said so
  std::string waiting_;
  Clock::time_point began_;                 // to join
  std::optional<Clock::time_point> heard_;  // the last answer
  Deadline again_ = Deadline::after({});
  sockaddr_in address_{};  // of the coordinator, once it was heard
  Deadline probe_ = Deadline::after({});
  int refused_ = 0;  // times in a row that nobody listened
};

}  // namespace lockstep
