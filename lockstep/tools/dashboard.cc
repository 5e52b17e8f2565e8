#include "lockstep/tools/dashboard.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <httplib.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <strings.h>
#include <sys/eventfd.h>

#include <array>
#include <atomic>
#include <mutex>
#include <nlohmann/json.hpp>
#include <semaphore>
#include <thread>

#include "lockstep/base/deadline.h"
#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/base/numbers.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t kThreads = 4, kMostWaiting = 32, kMostRequestBytes = 8192;
constexpr int kMostInKernel = 64;
constexpr Clock::duration kMostTime = 3s;  // a whole connection
constexpr Clock::duration kMostOften = 200ms, kIdle = 2s;

// One connection and its one request, with an end to its time and to the bytes that it may send.
// The library sees the request line and the Host alone: it has endless patience and memory for the
// rest, and regular expressions that a long header (Range) takes through the end of the stack.
class BoundedStream : public httplib::Stream {
 public:
  BoundedStream(int fd, int stop_fd) : fd_(fd), stop_fd_(stop_fd) {}

  bool is_readable() const override { return true; }
  bool is_writable() const override { return wait_for(POLLOUT); }
  ssize_t read(char* to, size_t size) override {
    if (request_.empty() && !receive()) return -1;
    const std::size_t count = request_.copy(to, size, next_);
    next_ += count;
    return ssize_t(count);
  }
  ssize_t write(const char* from, size_t size) override {
    return wait_for(POLLOUT) ? ::send(fd_, from, size, MSG_NOSIGNAL | MSG_DONTWAIT) : -1;
  }
  void get_remote_ip_and_port(std::string&, int&) const override {}
  void get_local_ip_and_port(std::string&, int&) const override {}
  socket_t socket() const override { return fd_; }

 private:
  bool receive() {
    std::string head;
    std::size_t end = std::string::npos;
    while (end == std::string::npos) {
      std::array<char, 1024> bytes;
      if (head.size() >= kMostRequestBytes || !wait_for(POLLIN)) return false;
      const ssize_t count = ::recv(fd_, bytes.data(), bytes.size(), MSG_DONTWAIT);
      if (count <= 0) return false;
      head.append(bytes.data(), std::size_t(count));
      end = head.find("\r\n\r\n");
    }
    for (std::size_t at = 0; at <= end;) {
      const std::size_t next = head.find("\r\n", at) + 2;
      const std::string line = head.substr(at, next - at);
      if (at == 0 || ::strncasecmp(line.c_str(), "host:", 5) == 0) request_ += line;
      at = next;
    }
    request_ += "\r\n";
    return true;
  }
  bool wait_for(short what) const {
    if (until_.expired()) return false;
    std::array<pollfd, 2> fds = {pollfd{fd_, what, 0}, pollfd{stop_fd_, POLLIN, 0}};
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until_.remaining());
    return ::poll(fds.data(), fds.size(), int(left.count())) > 0 && fds[1].revents == 0;
  }

  int fd_, stop_fd_;
  Deadline until_ = Deadline::after(kMostTime);
  std::string request_;
  std::size_t next_ = 0;
};

// Full, it leaves connections in the kernel's queue: no client makes this process
// hold more than kThreads + kMostWaiting + 1 descriptors.
class BoundedQueue : public httplib::TaskQueue {
 public:
  void enqueue(std::function<void()> task) override {
    room_.acquire();
    threads_.enqueue([this, task = std::move(task)] {
      task();
      room_.release();
    });
  }
  void shutdown() override { threads_.shutdown(); }

 private:
  std::counting_semaphore<> room_{kThreads + kMostWaiting};
  httplib::ThreadPool threads_{kThreads};
};

class Server : public httplib::Server {
 public:
  Server() : stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  void stop_connections() { ::eventfd_write(stop_.get(), 1); }

 private:
  bool process_and_close_socket(socket_t socket) override {
    const UniqueFd fd(socket);
    ::fcntl(socket, F_SETFD, FD_CLOEXEC);  // it is no worker's
    BoundedStream stream(socket, stop_.get());
    bool closed = false;
    const bool done = process_request(stream, /*close_connection=*/true, closed, nullptr);
    ::shutdown(socket, SHUT_RDWR);
    return done;
  }

  UniqueFd stop_;
};

struct Snapshot {
  std::string json, metrics, health;
  bool healthy = true;
  Clock::time_point made = Clock::now();
};

int port_of(const std::string& text, const std::string& flag) {
  if (const auto port = whole_number(text, 0, 65535)) return *port;
  const std::string hint = "a port of 127.0.0.1, for example 8080; 0 takes a free one";
  if (text.find_first_of(".:") != std::string::npos)
    throw ConfigError(
        fmt::format("{} {}: other addresses than the loopback are not served", flag, text), hint);
  throw ConfigError(fmt::format("{} {} is no port", flag, text), hint);
}

bool is_loopback(std::string host) {
  const std::size_t colon = host.rfind(':');
  if (colon != std::string::npos && host.find(']', colon) == std::string::npos) host.resize(colon);
  for (char& c : host) c = char(std::tolower(static_cast<unsigned char>(c)));
  return host == "127.0.0.1" || host == "localhost" || host == "[::1]";
}

}  // namespace

struct Dashboard::State {
  Server server;
  std::thread thread;
  std::atomic<bool> over = false;  // the thread's work
  int port = 0;
  double stale_after_s = 0;
  std::string page = status_page(nullptr), policy = page_policy() + "; frame-ancestors 'none'";

  mutable std::mutex mutex;  // of the two below; held for a moment
  std::shared_ptr<const Snapshot> snapshot = std::make_shared<Snapshot>();
  bool seen = false;

  std::shared_ptr<const Snapshot> look() {
    const std::lock_guard lock(mutex);
    seen = true;
    return snapshot;
  }
  void route();
  void answer_health(httplib::Response& response);
};

void Dashboard::State::answer_health(httplib::Response& response) {
  const auto now = look();
  const double age = seconds(Clock::now() - now->made);
  std::string reason = now->healthy ? "" : now->health;
  if (reason.empty() && age > stale_after_s)
    reason = fmt::format("the agent has said nothing for {:.0f} s", age);
  response.status = reason.empty() ? 200 : 503;
  response.set_content((reason.empty() ? "ok" : reason) + "\n", "text/plain; charset=utf-8");
}

void Dashboard::State::route() {
  using httplib::Request, httplib::Response, httplib::Server;
  const auto refuse = [](Response& response, int status, const char* why) {
    response.status = status;
    response.set_content(std::string(why) + "\n", "text/plain; charset=utf-8");
    return Server::HandlerResponse::Handled;
  };
  server.set_pre_routing_handler([=](const Request& request, Response& response) {
    if (!is_loopback(request.get_header_value("Host")) ||
        request.get_header_value_count("Host") > 1)
      return refuse(response, 403, "only for 127.0.0.1 and localhost");
    if (request.method != "GET" && request.method != "HEAD")
      return refuse(response, 405, "read-only");
    return Server::HandlerResponse::Unhandled;
  });
  server.set_default_headers({{"Content-Security-Policy", policy},
                              {"X-Content-Type-Options", "nosniff"},
                              {"Cross-Origin-Resource-Policy", "same-origin"},
                              {"Referrer-Policy", "no-referrer"},
                              {"Cache-Control", "no-store"}});
  server.Get("/", [this](const Request&, Response& response) {
    look();
    response.set_content(page, "text/html; charset=utf-8");
  });
  server.Get("/status.json", [this](const Request&, Response& response) {
    response.set_content(look()->json, "application/json");
  });
  server.Get("/metrics", [this](const Request&, Response& response) {
    response.set_content(look()->metrics, "text/plain; version=0.0.4; charset=utf-8");
  });
  server.Get("/healthz", [this](const Request&, Response& response) { answer_health(response); });
}

Dashboard::Dashboard(const std::string& place, const std::string& flag, double stale_after_s)
    : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.stale_after_s = stale_after_s;
  const int wanted = port_of(place, flag);
  state.server.new_task_queue = [] { return new BoundedQueue; };
  // Without this the library shares a port with whoever listens on it already.
  int listening = -1;
  state.server.set_socket_options([&listening](socket_t socket) {
    const int yes = 1;
    ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    listening = socket;
  });
  state.route();
  errno = 0;
  state.port = wanted == 0 ? state.server.bind_to_any_port("127.0.0.1")
               : state.server.bind_to_port("127.0.0.1", wanted) ? wanted
                                                                : -1;
  if (state.port <= 0)
    throw ConfigError(fmt::format("{} {}: cannot listen on 127.0.0.1:{}: {}", flag, place, wanted,
                                  errno_text(errno)),
                      flag + " 0 takes a free port");
  // The library's queue of 5 in the kernel makes a browser's burst wait for a second or more.
  ::listen(listening, kMostInKernel);
  // Signals are the agent's, which waits for them; a thread that takes one would end the process.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  state.thread = std::thread([&state] {
    state.server.listen_after_bind();
    state.over = true;
  });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Dashboard::~Dashboard() {
  state_->server.stop_connections();
  // The library forgets a stop() that comes before its thread listens.
  while (!state_->server.is_running() && !state_->over) std::this_thread::yield();
  state_->server.stop();
  state_->thread.join();
}

std::string Dashboard::url() const { return fmt::format("http://127.0.0.1:{}/", state_->port); }

bool Dashboard::wants_snapshot() const {
  const std::lock_guard lock(state_->mutex);
  const auto age = Clock::now() - state_->snapshot->made;
  return state_->snapshot->json.empty() || age >= (state_->seen ? kMostOften : kIdle);
}

void Dashboard::publish(const nlohmann::json& status) {
  auto snapshot = std::make_shared<Snapshot>();
  snapshot->json = status.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  snapshot->metrics = prometheus_text(status);
  snapshot->healthy = status.at("health").at("ok");
  snapshot->health = status.at("health").at("reason");
  const std::lock_guard lock(state_->mutex);
  state_->snapshot = std::move(snapshot);
  state_->seen = false;
}

}  // namespace lockstep
