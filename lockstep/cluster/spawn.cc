#include "lockstep/cluster/spawn.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "lockstep/base/deadline.h"
#include "lockstep/base/error.h"
#include "lockstep/base/numbers.h"

namespace lockstep {
namespace {

struct Pipe {
  UniqueFd read_end, write_end;
};

Pipe make_pipe() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0)
    throw Error("cannot start a worker: no pipe: " + errno_text(errno));
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

struct ChildPlan {
  char** arguments;
  char** environment;
  int parent, output, error, events, inherited, status;
};

// Between fork and exec: async-signal-safe calls only.
[[noreturn]] void become_worker(const ChildPlan& plan) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != plan.parent) ::_exit(127);  // the agent died before the line above
  for (int number = 1; number < NSIG; ++number) ::signal(number, SIG_DFL);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  const int input = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (input >= 0 && ::dup2(input, STDIN_FILENO) >= 0 && ::dup2(plan.output, STDOUT_FILENO) >= 0 &&
      ::dup2(plan.error, STDERR_FILENO) >= 0) {
    ::fcntl(plan.events, F_SETFD, 0);
    if (plan.inherited >= 0) ::fcntl(plan.inherited, F_SETFD, 0);
    ::execvpe(plan.arguments[0], plan.arguments, plan.environment);
  }
  const int error = errno;
  [[maybe_unused]] const ssize_t written = ::write(plan.status, &error, sizeof error);
  ::_exit(127);
}

// The parent's id from /proc/PID/stat: "PID (NAME) STATE PPID …", where NAME may hold anything.
int parent_of(const std::string& pid) {
  std::ifstream file("/proc/" + pid + "/stat");
  std::string text;
  std::getline(file, text, '\0');
  const std::size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return -1;
  std::istringstream rest(text.substr(name_end + 1));
  std::string state;
  int parent = -1;
  rest >> state >> parent;
  return parent;
}

std::uint64_t counter_in(const std::string& path, std::string_view name) {
  std::ifstream file(path);
  std::string key;
  for (std::uint64_t value = 0; file >> key >> value;)
    if (key == name) return value;
  return 0;
}

}  // namespace

StreamEnds make_streams() {
  StreamEnds ends;
  for (UniqueFd Streams::*stream : {&Streams::output, &Streams::error, &Streams::events}) {
    Pipe pipe = make_pipe();
    ::fcntl(pipe.read_end.get(), F_SETFL, ::fcntl(pipe.read_end.get(), F_GETFL) | O_NONBLOCK);
    ends.read.*stream = std::move(pipe.read_end);
    ends.write.*stream = std::move(pipe.write_end);
  }
  return ends;
}

Process adopt(int pid) {
  Process process;
  process.pid = pid;
  process.pidfd = UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!process.pidfd) {
    const int reason = errno;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    throw Error("cannot watch a worker: " + errno_text(reason));
  }
  return process;
}

Process spawn(const std::vector<std::string>& command, Environment environment,
              const Streams& streams, int inherited_fd) {
  Pipe status = make_pipe();
  environment["LOCKSTEP_EVENT_FD"] = std::to_string(streams.events.get());
  std::vector<std::string> entries;
  for (const auto& [name, value] : environment) entries.push_back(name + "=" + value);
  const auto pointers = [](const std::vector<std::string>& texts) {
    std::vector<char*> result;
    for (const std::string& text : texts) result.push_back(const_cast<char*>(text.c_str()));
    result.push_back(nullptr);
    return result;
  };
  std::vector<char*> arguments = pointers(command), variables = pointers(entries);
  const ChildPlan plan{arguments.data(),     variables.data(),      ::getpid(),
                       streams.output.get(), streams.error.get(),   streams.events.get(),
                       inherited_fd,         status.write_end.get()};

  const int pid = ::fork();
  if (pid < 0) throw Error("cannot start a worker: " + errno_text(errno));
  if (pid == 0) become_worker(plan);
  ::setpgid(pid, pid);  // both sides do it: whoever comes first
  Process process = adopt(pid);
  process.exec_status = std::move(status.read_end);
  return process;
}

int wait_for_exec(const Process& process) {
  int error = 0;
  ssize_t count;
  do count = ::read(process.exec_status.get(), &error, sizeof error);
  while (count < 0 && errno == EINTR);
  return count == sizeof error ? error : 0;
}

std::vector<int> child_processes() {
  siginfo_t info{};
  if (::waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0) return {};  // ECHILD
  std::vector<int> children;
  const int self = ::getpid();
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", ignored)) {
    const std::string name = entry.path().filename();
    if (const auto pid = whole_number(name, 1, INT_MAX); pid && parent_of(name) == self)
      children.push_back(*pid);
  }
  return children;
}

bool kill_children_except(const std::vector<int>& spared) {
  const Deadline deadline = Deadline::after(std::chrono::seconds(10));
  for (;;) {
    std::vector<int> children = child_processes();
    std::erase_if(children, [&](int pid) {
      return std::find(spared.begin(), spared.end(), pid) != spared.end();
    });
    if (children.empty()) return true;
    if (deadline.expired()) return false;
    for (int pid : children) ::kill(pid, SIGKILL);
    for (int pid : children) {
      const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
      pollfd ended{pidfd.get(), POLLIN, 0};
      ::poll(&ended, 1, 1000);  // one that is stuck in the kernel may not go
      ::waitpid(pid, nullptr, WNOHANG);
    }
  }
}

std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name != nullptr ? std::string("SIG") + name : "signal " + std::to_string(signal);
}

std::uint64_t out_of_memory_kills() {
  std::ifstream groups("/proc/self/cgroup");
  std::uint64_t kills = 0;
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty())
      kills += counter_in("/sys/fs/cgroup" + path + "/memory.events", "oom_kill");
    else if (controllers == "memory")  // version 1
      kills += counter_in("/sys/fs/cgroup/memory" + path + "/memory.oom_control", "oom_kill");
  }
  return kills;
}

}  // namespace lockstep
