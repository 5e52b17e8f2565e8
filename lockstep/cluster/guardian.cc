#include "lockstep/cluster/guardian.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr std::size_t kMostGroups = 4096;

// Messages are group ids: to watch, negative to forget, 0 for goodbye. Forked from a process that
// may have threads: async-signal-safe calls only.
[[noreturn]] void guard(int socket) {
  ::setsid();  // a terminal's signals are not for it
  ::prctl(PR_SET_NAME, "lockstep-guard");
  for (int number = 1; number < NSIG; ++number) ::signal(number, SIG_IGN);
  ::dup2(socket, STDIN_FILENO);
  ::close_range(1, ~0u, 0);
  std::array<std::int32_t, kMostGroups> groups{};
  for (std::int32_t number = 0;;) {
    const ssize_t count = ::recv(STDIN_FILENO, &number, sizeof number, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count != sizeof number) break;
    if (number == 0) ::_exit(0);
    const std::int32_t wanted = number > 0 ? 0 : -number;
    for (std::int32_t& group : groups)
      if (group == wanted) {
        group = number > 0 ? number : 0;
        break;
      }
  }
  for (const std::int32_t group : groups)
    if (group > 1) ::kill(-group, SIGKILL);
  ::_exit(0);
}

}  // namespace

Guardian::Guardian() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
    throw Error("cannot watch the workers: no socket: " + errno_text(errno));
  socket_ = UniqueFd(ends[0]);
  const UniqueFd its_end(ends[1]);
  pid_ = ::fork();
  if (pid_ < 0) throw Error("cannot watch the workers: " + errno_text(errno));
  if (pid_ == 0) guard(its_end.get());
}

Guardian::~Guardian() {
  tell(0);
  while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

void Guardian::watch(int group) { tell(group); }
void Guardian::forget(int group) { tell(-group); }

// One that was killed is missed only if the agent is, too.
void Guardian::tell(int number) {
  const std::int32_t message = number;
  [[maybe_unused]] const ssize_t sent =
      ::send(socket_.get(), &message, sizeof message, MSG_NOSIGNAL);
}

}  // namespace lockstep
