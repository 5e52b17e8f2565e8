#include "lockstep/cluster/zygote.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <iterator>

#include "lockstep/base/error.h"
#include "lockstep/cluster/descriptors.h"

namespace lockstep {
namespace {

constexpr std::size_t kMostBytes = 64 << 10;  // of a request
constexpr std::size_t kDescriptors = 4;       // output, error, events, segment

struct Request {
  std::vector<std::pair<std::string, std::string>> variables;
  std::array<UniqueFd, kDescriptors> descriptors;
};

// "NAME=VALUE", each ended by a zero byte.
std::vector<std::pair<std::string, std::string>> variables_in(std::string_view bytes) {
  std::vector<std::pair<std::string, std::string>> variables;
  while (!bytes.empty()) {
    const std::size_t end = bytes.find('\0'), equals = bytes.find('=');
    if (end == bytes.npos || equals == 0 || equals >= end)
      throw Error("the zygote got a request that is none");
    variables.emplace_back(bytes.substr(0, equals), bytes.substr(equals + 1, end - equals - 1));
    bytes.remove_prefix(end + 1);
  }
  return variables;
}

// Waits for the next request. None: the agent is gone.
std::optional<Request> receive(int socket) {
  std::vector<char> bytes(kMostBytes);
  ReceivedMessage message = receive_with_descriptors(socket, bytes);
  if (message.bytes <= 0) return std::nullopt;
  if (message.cut || message.descriptors.size() != kDescriptors)
    throw Error("the zygote got a request that is none");
  Request request;
  std::ranges::move(message.descriptors, request.descriptors.begin());
  request.variables = variables_in({bytes.data(), std::size_t(message.bytes)});
  return request;
}

// In the new worker: what exec would have done. False if the agent is gone.
bool become_worker(Request& request, int agent, int between) {
  // The one in between ends at once; only then is the agent the parent, whose death is to be ours.
  const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, between, 0)));
  pollfd ended{pidfd.get(), POLLIN, 0};
  while (pidfd && ::getppid() == between && (::poll(&ended, 1, -1) >= 0 || errno == EINTR))
    if (ended.revents != 0) break;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != agent) return false;
  ::prctl(PR_SET_NAME, "lockstep-worker");
  auto& [output, error, events, segment] = request.descriptors;
  if (::dup2(output.get(), STDOUT_FILENO) < 0 || ::dup2(error.get(), STDERR_FILENO) < 0)
    return false;
  output = UniqueFd();
  error = UniqueFd();
  for (const auto& [name, value] : request.variables) ::setenv(name.c_str(), value.c_str(), 1);
  ::setenv("LOCKSTEP_EVENT_FD", std::to_string(events.release()).c_str(), 1);
  ::setenv("LOCKSTEP_SEGMENT_FD", std::to_string(segment.release()).c_str(), 1);
  return true;
}

int threads_of_this_process() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
}

}  // namespace

Process Zygote::start(const std::vector<std::string>& command, Environment environment,
                      const Streams& its_streams) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
    throw Error("cannot start a worker: no socket: " + errno_text(errno));
  socket_ = UniqueFd(ends[0]);
  const UniqueFd its_end(ends[1]);
  environment["LOCKSTEP_ZYGOTE_FD"] = std::to_string(its_end.get());
  return spawn(command, std::move(environment), its_streams, its_end.get());
}

int Zygote::request(const Environment& environment, const Streams& streams, int segment_fd) {
  std::string bytes;
  for (const auto& [name, value] : environment) bytes += name + "=" + value + '\0';
  LOCKSTEP_CHECK(bytes.size() <= kMostBytes);
  const std::array<int, kDescriptors> fds = {streams.output.get(), streams.error.get(),
                                             streams.events.get(), segment_fd};
  return send_with_descriptors(socket_.get(), bytes, fds, MSG_DONTWAIT) < 0 ? errno : 0;
}

std::optional<int> Zygote::answer() {
  std::int32_t pid = 0;
  const ssize_t count = ::recv(socket_.get(), &pid, sizeof pid, MSG_DONTWAIT);
  if (count == sizeof pid) return pid;
  if (count == 0 || (count < 0 && errno == ECONNRESET)) ended_ = true;
  return std::nullopt;
}

void serve_as_zygote(int socket_fd) {
  UniqueFd socket(socket_fd);
  ::prctl(PR_SET_NAME, "lockstep-zygote");
  LOCKSTEP_CHECK(threads_of_this_process() == 1, "a zygote has one thread");
  const int agent = ::getppid();
  while (std::optional<Request> request = receive(socket.get())) {
    const int between = ::fork();
    if (between == 0) {
      const int self = ::getpid();
      const int worker = ::fork();
      if (worker == 0) {
        socket = UniqueFd();
        if (!become_worker(*request, agent, self)) ::_exit(127);
        return;
      }
      // Its own group before the agent knows of it: the agent signals groups.
      if (worker > 0) ::setpgid(worker, worker);
      const std::int32_t answer = worker > 0 ? worker : -errno;
      ::_exit(::send(socket.get(), &answer, sizeof answer, MSG_NOSIGNAL) < 0 ? 1 : 0);
    }
    if (between > 0) {
      while (::waitpid(between, nullptr, 0) < 0 && errno == EINTR) {
      }
    } else {
      const std::int32_t answer = -errno;
      if (::send(socket.get(), &answer, sizeof answer, MSG_NOSIGNAL) < 0) break;
    }
  }
  ::_exit(0);
}

}  // namespace lockstep
