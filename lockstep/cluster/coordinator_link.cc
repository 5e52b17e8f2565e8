#include "lockstep/cluster/coordinator_link.h"

#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/cluster/json_reading.h"
#include "lockstep/cluster/membership_wire.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr auto kEvery = std::chrono::milliseconds(250);
constexpr auto kRetry = std::chrono::milliseconds(50);  // while there is no connection
constexpr auto kJoin = std::chrono::minutes(10);
constexpr auto kComeBack = std::chrono::minutes(1);  // once joined: for the link to return
constexpr auto kSilence = std::chrono::milliseconds(700);
constexpr int kRefused = 3;                               // then the coordinator has ended
constexpr std::size_t kMostBytes = kMaxControlBytes / 2;  // of events in one message

// 0.0.0.0: its name is not known now.
sockaddr_in address_of(const std::string& endpoint) {
  const std::string address = endpoint.substr(endpoint.rfind('/') + 1);
  const std::size_t colon = address.rfind(':');
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  sockaddr_in result{};
  if (::getaddrinfo(address.substr(0, colon).c_str(), address.substr(colon + 1).c_str(), &hints,
                    &found) != 0)
    return result;
  std::memcpy(&result, found->ai_addr, sizeof result);
  ::freeaddrinfo(found);
  return result;
}

// Whether there is a machine, and nobody listens there: ECONNREFUSED, soon.
bool nobody_listens(const sockaddr_in& address) {
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd || address.sin_addr.s_addr == 0 ||
      ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0)
    return false;
  pollfd done{fd.get(), POLLOUT, 0};
  int error = errno;
  socklen_t length = sizeof error;
  if (error == EINPROGRESS && (::poll(&done, 1, 100) != 1 ||
                               ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length) != 0))
    return false;
  return error == ECONNREFUSED;
}

}  // namespace

CoordinatorLink::CoordinatorLink(const ControlTarget& target, NodeIntroduction self,
                                 Clock::time_point now)
    : target_(target), self_(std::move(self)), epoll_(::epoll_create1(EPOLL_CLOEXEC)), began_(now) {
  connect();
}

void CoordinatorLink::connect() {
  client_.reset();  // and with it out of the epoll
  client_ = std::make_unique<ControlClient>(target_);
  epoll_event event{};
  event.events = EPOLLIN;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, client_->fd(), &event) != 0)
    throw Error("cannot watch the way to node 0: " + errno_text(errno));
}

void CoordinatorLink::join_again(Clock::time_point now) {
  self_.after = life_;
  life_ = -1;
  report_ = nullptr;
  events_.clear();
  first_event_ = published_ = 0;
  stop_ = finished_ = leaving_ = false;
  left_id_ = 0;
  began_ = now;
  waiting_.clear();
  changed_ = true;
}

void CoordinatorLink::tell(int rank, const json& event) {
  events_.push_back({{"rank", rank}, {"event", event}});
  changed_ = true;
}

void CoordinatorLink::report(const NodeReport& report, Clock::time_point, bool left) {
  // This coordinator made the generation, and has no successor that would have to learn of it.
  NodeReport without = report;
  without.generation = nullptr;
  published_ = report.generation ? report.generation->number + 1 : 0;
  report_ = to_json(without);
  leaving_ |= left;
  changed_ = true;
}

void CoordinatorLink::send(Clock::time_point now) {
  ControlRequest request{.id = last_id_ + 1, .action = joined() ? "report" : "join"};
  if (!joined()) {
    request.arguments = to_json(self_);
  } else {
    json events = json::array();
    std::size_t bytes = 0;
    for (const json& event : events_) {
      bytes += event.dump(-1, ' ', false, json::error_handler_t::replace).size();
      if (bytes > kMostBytes && !events.empty()) break;
      events.push_back(event);
    }
    request.arguments = {{"report", report_},
                         {"published", published_},
                         {"first", first_event_},
                         {"events", events},
                         {"stop", stop_},
                         {"finished", finished_},
                         {"left", leaving_ && events.size() == events_.size()}};
    if (left_id_ == 0 && request.arguments["left"] == true) left_id_ = request.id;
  }
  const bool sent = client_->send(request);
  if (sent) ++last_id_, changed_ = false;
  again_ = Deadline::at(now + (sent ? kEvery : kRetry));
}

CoordinatorLink::News CoordinatorLink::receive(Clock::time_point now) {
  News news;
  try {
    if ((changed_ || again_.expired(now)) && (!joined() || !report_.is_null())) send(now);
    for (const ControlReply& reply : client_->drain()) {
      if (!heard_) address_ = address_of(target_.endpoint);
      heard_ = now;
      refused_ = 0;
      take(reply, news);
    }
  } catch (const CommError&) {
    if (!heard_) throw;  // another key
    connect();
    again_ = Deadline::at(now + kRetry);
  }
  if (!news.waiting.empty() && std::exchange(waiting_, news.waiting) == news.waiting)
    news.waiting.clear();
  check_patience(now);
  return news;
}

void CoordinatorLink::take(const ControlReply& reply, News& news) {
  if (!reply.error.empty()) {
    if (reply.bad_input) throw ConfigError(reply.error);
    throw Error(reply.error);
  }
  const json& said = reply.result;
  if (!joined()) {
    if (said.contains("welcome")) {
      news.welcome = welcome_from(said["welcome"]);
      life_ = news.welcome->node;
      first_id_ = last_id_ + 1;
    } else if (said.contains("wait")) {
      news.waiting = text_in(said, "wait");
    } else if (said.contains("ended")) {
      news.ended = true;
    }
    return;
  }
  if (reply.id < first_id_) return;  // to what this node was before
  if (said.contains("unknown")) {
    news.unknown = true;
    return;
  }
  const auto assignment = said.find("assignment");
  if (assignment == said.end()) return;
  news.assignment = assignment_from(*assignment);
  news.stop |= said.value("stop", json()) == true;
  news.struck = read_json<std::vector<std::string>>(said.value("struck", json()));
  const std::uint64_t taken = whole_in(said, "events");
  for (; first_event_ < taken && !events_.empty(); ++first_event_) events_.pop_front();
  left_taken_ |= left_id_ > 0 && reply.id >= left_id_;
}

void CoordinatorLink::check_patience(Clock::time_point now) {
  const Clock::duration silent = now - heard_.value_or(began_);
  if (silent > (heard_ ? kComeBack : kJoin))
    throw CommError(
        fmt::format("no word from node 0 ({}) for {:.0f} s", target_.endpoint, seconds(silent)));
  if (!heard_ || silent < kSilence || !probe_.expired(now)) return;
  probe_ = Deadline::at(now + kSilence);
  refused_ = nobody_listens(address_) ? refused_ + 1 : 0;
  if (refused_ < kRefused) return;
  left_taken_ = left_id_ > 0;  // it has ended without this node, which had no more to say
  if (!left_taken_)
    throw CommError(
        fmt::format("node 0 has ended: nobody listens at {} any more", target_.endpoint));
}

}  // namespace lockstep
