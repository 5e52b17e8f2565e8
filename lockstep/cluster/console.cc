#include "lockstep/cluster/console.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace lockstep {
namespace {

constexpr std::size_t kFullBytes = std::size_t{1} << 20;

}  // namespace

int poll_timeout_ms(const Deadline& deadline) {
  if (deadline.is_never()) return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline.remaining()).count();
  return static_cast<int>(std::min<decltype(left)>(left, INT_MAX));
}

Console::Console(int output, int error) {
  open(streams_[0], output);
  open(streams_[1], error);
  struct stat first {
  }, second{};
  same_ = ::fstat(output, &first) == 0 && ::fstat(error, &second) == 0 &&
          first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

// Whether a descriptor blocks belongs to the open file, which the shell and others share: it is not
// ours to change. Where the file cannot be opened anew (the ends of another user's pipe), pass_on()
// asks before each write and writes no more than a pipe that is ready takes.
void Console::open(Stream& stream, int fd) {
  stream.fd = fd;
  struct stat status {};
  if (::fstat(fd, &status) != 0) return;
  stream.waits = !S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode);
  stream.socket = S_ISSOCK(status.st_mode);
  if (!stream.waits || stream.socket) return;
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  stream.reopened = UniqueFd(::open(path.c_str(), O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
}

void Console::write(bool error, std::string_view text) {
  Stream& to = stream(error);
  if (to.failure == 0) to.kept.append(text);
}

void Console::pass_on() {
  for (Stream& each : streams_) pass_on(each);
}

void Console::pass_on(Stream& stream) {
  const int fd = stream.reopened ? stream.reopened.get() : stream.fd;
  while (stream.done < stream.kept.size()) {
    pollfd ready{fd, POLLOUT, 0};
    if (stream.waits && ::poll(&ready, 1, 0) <= 0) break;
    std::size_t size = stream.kept.size() - stream.done;
    if (stream.waits && !stream.reopened) size = std::min<std::size_t>(size, PIPE_BUF);
    const char* bytes = stream.kept.data() + stream.done;
    const ssize_t count = stream.socket ? ::send(fd, bytes, size, MSG_DONTWAIT | MSG_NOSIGNAL)
                                        : ::write(fd, bytes, size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) break;
    if (count < 0) stream.failure = errno;
    stream.done = count < 0 ? stream.kept.size() : stream.done + static_cast<std::size_t>(count);
  }
  // Moving what is left to the front each time would cost more than the writes.
  if (stream.done < stream.kept.size() && stream.done < kFullBytes) return;
  stream.kept.erase(0, stream.done);
  stream.done = 0;
}

void Console::flush(Deadline deadline) {
  for (pass_on(); !idle() && !deadline.expired(); pass_on()) {
    std::array<pollfd, 2> streams = wanted();
    ::poll(streams.data(), streams.size(), poll_timeout_ms(deadline));
  }
}

bool Console::idle() const { return streams_[0].kept.empty() && streams_[1].kept.empty(); }

bool Console::full() const {
  return std::any_of(streams_.begin(), streams_.end(), [](const Stream& stream) {
    return stream.kept.size() - stream.done > kFullBytes;
  });
}

std::array<pollfd, 2> Console::wanted() const {
  std::array<pollfd, 2> result{};
  for (std::size_t i = 0; i < 2; ++i) {
    const Stream& stream = streams_[i];
    const int fd = stream.reopened ? stream.reopened.get() : stream.fd;
    result[i] = {stream.kept.empty() ? -1 : fd, POLLOUT, 0};
  }
  return result;
}

}  // namespace lockstep
