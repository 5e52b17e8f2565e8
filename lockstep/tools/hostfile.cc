#include "lockstep/tools/hostfile.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/cluster/control_key.h"
#include "lockstep/tools/commands.h"

namespace lockstep {
namespace {

constexpr int kPort = 29400;
constexpr time_t kEndPatience = 30;  // from the end of their input, seconds

std::string quoted(const std::string& word) {
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

// "--name value", "--name=value", in both spellings.
bool takes_out(const std::string& word, std::string_view name, bool& value_follows) {
  std::string plain = word.substr(0, word.find('='));
  std::replace(plain.begin(), plain.end(), '_', '-');
  value_follows = plain == name && word.find('=') == std::string::npos;
  return plain == name;
}

}  // namespace

std::vector<std::string> read_hostfile(const std::string& path) {
  std::istringstream text(read_text_file(path));
  std::vector<std::string> hosts;
  for (std::string line; std::getline(text, line);) {
    std::istringstream words(line.substr(0, line.find('#')));
    if (std::string host; words >> host) hosts.push_back(host);
  }
  if (hosts.empty()) throw ConfigError(fmt::format("{} names no host", path), "one a line");
  for (const std::string& host : hosts)
    if (host.starts_with('-')) throw ConfigError(fmt::format("{}: {} is no host", path, host));
  return hosts;
}

std::string words_for(const std::string& program, const std::string& command,
                      const std::vector<std::string>& arguments,
                      const std::vector<std::string>& hosts, int rank) {
  const std::string first = hosts[0].substr(hosts[0].find('@') + 1);  // USER@HOST
  std::string words =
      fmt::format("{} {} --nnodes={} --node-rank={} --rdzv-endpoint={}:{} --key-file=-",
                  quoted(program), command, hosts.size(), rank, first, kPort);
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    bool taken = false, value_follows = false;
    for (const char* name : {"--hostfile", "--ssh", "--key-file"})
      taken = taken || takes_out(arguments[i], name, value_follows);
    if (!taken)
      words += " " + quoted(arguments[i]);
    else if (value_follows)
      ++i;
  }
  return words;
}

int run_on_hosts(const std::string& command, const std::vector<std::string>& arguments,
                 const std::string& hostfile, const std::string& ssh, const std::string& key_file) {
  const std::vector<std::string> hosts = read_hostfile(hostfile);
  const ControlKey key = key_file.empty() ? make_control_key() : read_control_key(key_file);
  const std::string secret = nlohmann::json::parse(format_control_key(key)).dump() + "\n";
  const std::string program = std::filesystem::read_symlink("/proc/self/exe");
  const std::string folder = std::filesystem::current_path();
  sigset_t signals, before;
  ::sigemptyset(&signals);
  for (const int one : {SIGINT, SIGTERM, SIGHUP, SIGCHLD}) ::sigaddset(&signals, one);
  ::sigprocmask(SIG_BLOCK, &signals, &before);
  std::map<pid_t, std::pair<std::string, UniqueFd>> running;  // host, its input
  for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw Error("no pipe: " + errno_text(errno));
    const UniqueFd input(ends[0]);
    UniqueFd output(ends[1]);
    // `exec`, so that ssh's end reaches lockstep itself; ssh's flags are the user's.
    const std::string line = fmt::format(
        "exec {} {} {}", ssh, quoted(hosts[rank]),
        quoted(fmt::format("cd {} && exec {}", quoted(folder),
                           words_for(program, command, arguments, hosts, static_cast<int>(rank)))));
    const pid_t parent = ::getpid(), pid = ::fork();
    if (pid < 0) throw Error("cannot start ssh: " + errno_text(errno));
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGTERM);
      ::sigprocmask(SIG_SETMASK, &before, nullptr);
      ::setpgid(0, 0);  // a Ctrl-C is told through their input
      if (::getppid() == parent && ::dup2(input.get(), STDIN_FILENO) >= 0)
        ::execl("/bin/sh", "sh", "-c", line.c_str(), nullptr);
      ::_exit(127);
    }
    [[maybe_unused]] const auto told = ::write(output.get(), secret.data(), secret.size());
    running.emplace(pid, std::pair(hosts[rank], std::move(output)));
  }
  int code = 0, signal = 0;
  bool ending = false;
  while (!running.empty()) {
    const timespec patience{ending ? kEndPatience : 3600, 0};
    const int number = ::sigtimedwait(&signals, nullptr, &patience);
    if (number < 0 && errno == EAGAIN && ending)
      for (const auto& [pid, host] : running) ::kill(-pid, SIGKILL);
    if (number > 0 && number != SIGCHLD) signal = number;
    int status = 0;
    for (pid_t pid; (pid = ::waitpid(-1, &status, WNOHANG)) > 0;) {
      const auto host = running.extract(pid);
      const int its = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      if (its == 0 || host.empty()) continue;
      if (code == 0) code = its;
      if (its == 255)
        print_error(fmt::format("lockstep: ssh to {} has failed\n", host.mapped().first));
    }
    if ((signal != 0 || code != 0) && !std::exchange(ending, true))
      for (auto& [pid, host] : running) host.second = UniqueFd();
  }
  ::sigprocmask(SIG_SETMASK, &before, nullptr);
  if (signal != 0) throw Interrupted(signal);
  return code;
}

}  // namespace lockstep
