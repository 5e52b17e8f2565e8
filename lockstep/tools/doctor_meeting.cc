#include "lockstep/tools/doctor_meeting.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <set>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/cluster/control.h"
#include "lockstep/cluster/control_message.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr auto kLook = std::chrono::milliseconds(20);  // between two questions
constexpr auto kFarewell = std::chrono::seconds(2);
constexpr int kClockReadings = 16;

std::int64_t wall_clock_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// Node 0's. Requests may come twice: what one asks for again it gets again.
class MeetingServer {
 public:
  MeetingServer(const MeetingOptions& options)
      : nodes_(options.nodes),
        server_({.address = options.address,
                 .key = options.key,
                 .most_connections = options.nodes + 16}),
        end_(::eventfd(0, EFD_CLOEXEC)),
        thread_([this] { serve(); }) {}
  ~MeetingServer() {
    ::eventfd_write(end_.get(), 1);
    thread_.join();
  }
  const std::string& endpoint() const { return server_.endpoint(); }
  bool all_have_heard() {
    const std::lock_guard lock(mutex_);
    return !complete_ || static_cast<int>(heard_.size()) == nodes_;
  }

 private:
  void serve();
  json answer(const ControlRequest& request);

  const int nodes_;
  ControlServer server_;
  UniqueFd end_;
  std::vector<std::uint64_t> lives_ = std::vector<std::uint64_t>(nodes_);  // 0: not come yet
  std::vector<std::vector<json>> rounds_;  // null: has not brought it
  std::mutex mutex_;
  bool complete_ = false;  // the last round
  std::set<int> heard_;    // of it
  std::thread thread_;
};

void MeetingServer::serve() {
  pollfd watched[] = {{server_.fd(), POLLIN, 0}, {end_.get(), POLLIN, 0}};
  while (watched[1].revents == 0) {
    server_.handle(
        [this](const ControlRequest& request, const ControlPeer&) { return answer(request); });
    ::poll(watched, 2, -1);
  }
}

json MeetingServer::answer(const ControlRequest& request) {
  if (request.action == "clock") return {{"ns", wall_clock_ns()}};
  if (request.action != "gather") throw ConfigError("lockstep doctor is asked for something else");
  const json& asked = request.arguments;
  const std::uint64_t node = whole_in(asked, "node"), life = whole_in(asked, "life");
  const std::uint64_t round = whole_in(asked, "round");
  if (const std::uint64_t nodes = whole_in(asked, "nodes"); nodes != std::uint64_t(nodes_))
    throw ConfigError(fmt::format("node {} was started with --nnodes {}, node 0 with --nnodes {}",
                                  node, nodes, nodes_));
  if (node >= lives_.size() || round > rounds_.size() || !asked.contains("value"))
    throw ConfigError(fmt::format("node {} is none of {}", node, nodes_));
  if (lives_[node] != 0 && lives_[node] != life)
    throw ConfigError(fmt::format("two were started as node {}", node),
                      "--node-rank is another one for each node");
  lives_[node] = life;
  if (round == rounds_.size()) {
    rounds_.emplace_back(nodes_);
    const std::lock_guard lock(mutex_);
    complete_ = false;
    heard_.clear();
  }
  rounds_[round][node] = asked["value"];
  std::vector<std::size_t> missing;
  for (std::size_t other = 0; other < rounds_[round].size(); ++other)
    if (rounds_[round][other].is_null()) missing.push_back(other);
  if (!missing.empty()) return {{"missing", missing}};
  const std::lock_guard lock(mutex_);
  complete_ = true;
  if (round + 1 == rounds_.size()) heard_.insert(static_cast<int>(node));
  return {{"all", rounds_[round]}};
}

}  // namespace

struct Meeting::State {
  explicit State(const MeetingOptions& given)
      : options(given),
        server(given.node == 0 ? std::make_unique<MeetingServer>(given) : nullptr),
        client({server ? server->endpoint() : "tcp://" + given.address, given.key.server.public_key,
                given.key.client}) {}

  MeetingOptions options;
  std::unique_ptr<MeetingServer> server;
  ControlClient client;
  std::uint64_t life = std::random_device{}() | 1ull, round = 0;
};

Meeting::Meeting(const MeetingOptions& options) : state_(std::make_unique<State>(options)) {}

Meeting::~Meeting() {
  const Deadline farewell = Deadline::after(kFarewell);
  while (state_->server && !state_->server->all_have_heard() && !farewell.expired())
    std::this_thread::sleep_for(kLook);
}

std::vector<json> Meeting::gather(const json& mine) {
  const MeetingOptions& options = state_->options;
  const Deadline deadline = Deadline::after(options.patience);
  const json asked = {{"node", options.node},
                      {"nodes", options.nodes},
                      {"life", state_->life},
                      {"round", state_->round},
                      {"value", mine}};
  for (;;) {
    json answer = state_->client.request("gather", asked, Deadline::after(options.patience));
    if (answer.contains("all")) {
      ++state_->round;
      return answer["all"].get<std::vector<json>>();
    }
    if (deadline.expired())
      throw CommError(fmt::format("node {} did not come to {} within {:.3g} s",
                                  fmt::join(answer.at("missing").get<std::vector<int>>(), ", "),
                                  options.address, seconds(options.patience)));
    std::this_thread::sleep_for(kLook);
  }
}

// As NTP does it: of several readings the one that took least is the best.
ClockSkew Meeting::clock_skew() {
  ClockSkew best{0, 1e9};
  for (int reading = 0; reading < kClockReadings; ++reading) {
    const std::int64_t before = wall_clock_ns();
    const json answer =
        state_->client.request("clock", json::object(), Deadline::after(state_->options.patience));
    const std::int64_t after = wall_clock_ns();
    const double uncertainty = static_cast<double>(after - before) / 2e9;
    if (uncertainty >= best.uncertainty_s) continue;
    const auto theirs = static_cast<std::int64_t>(whole_in(answer, "ns"));
    best = {static_cast<double>(before - theirs) / 1e9 + uncertainty, uncertainty};
  }
  return best;
}

}  // namespace lockstep
