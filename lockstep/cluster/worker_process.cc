#include "lockstep/cluster/worker_process.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr std::size_t kLastWords = 10;
constexpr std::size_t kReadBytes = std::size_t{64} << 10;
constexpr int kPipeBytes = 1 << 20;  // what a pipe can hold at most

// What C++ and libtorch say when an allocation fails.
bool tells_of_memory(std::string_view text) {
  return text.find("std::bad_alloc") != text.npos ||
         text.find("can't allocate memory") != text.npos;
}

}  // namespace

const UniqueFd& WorkerProcess::stream(Stream stream) const {
  return stream == Stream::output  ? streams_.output
         : stream == Stream::error ? streams_.error
                                   : streams_.events;
}

bool WorkerProcess::read_some(Stream stream, const OnLine& on_line, const OnEvent& on_event) {
  UniqueFd& fd = const_cast<UniqueFd&>(this->stream(stream));
  if (!fd) return false;
  char bytes[kReadBytes];
  const ssize_t count = ::read(fd.get(), bytes, sizeof bytes);
  if (count < 0) return errno == EINTR;
  if (count == 0) fd = UniqueFd();  // which also ends watching it
  const std::string_view text(bytes, std::size_t(count));
  if (stream == Stream::events) {
    if (on_event) take_events(text, on_event);
    return count > 0;
  }
  const bool error = stream == Stream::error;
  const auto take = [&](std::string_view line) {
    if (error) {
      if (tells_of_memory(line)) out_of_memory_ = line;
      last_words_.emplace_back(line);
      if (last_words_.size() > kLastWords) last_words_.pop_front();
    }
    on_line(error, line);
  };
  LineSplitter& lines = error ? error_lines_ : output_lines_;
  if (count > 0)
    lines.feed(text, take);
  else
    lines.finish(take);
  return count > 0;
}

void WorkerProcess::take_events(std::string_view bytes, const OnEvent& on_event) {
  const auto broken = [&](const std::exception& error) {
    return Error(fmt::format("rank {} (pid {}): broken event: {}", rank, pid(), error.what()));
  };
  std::vector<nlohmann::json> events;
  try {
    events = events_.feed(as_byte_span(bytes));
  } catch (const Error& error) {
    throw broken(error);
  }
  for (const nlohmann::json& event : events) {
    try {
      note(event);
      on_event(event);
    } catch (const nlohmann::json::exception& error) {  // a member is missing or of a wrong type
      throw broken(error);
    }
  }
}

void WorkerProcess::drain(const OnLine& on_line, const OnEvent& on_event) {
  for (Stream stream : {Stream::output, Stream::error, Stream::events})
    for (int reads = 2 * kPipeBytes / int(kReadBytes);
         reads > 0 && read_some(stream, on_line, on_event);)
      --reads;
}

void WorkerProcess::finish_lines(const OnLine& on_line) {
  output_lines_.finish([&](std::string_view line) { on_line(false, line); });
  error_lines_.finish([&](std::string_view line) { on_line(true, line); });
}

void WorkerProcess::note(const nlohmann::json& event) {
  const std::string& name = event["event"].get_ref<const std::string&>();
  if (name == "comm_error") blames_others_ = true;
  if (name != "error") return;
  error_kind_ = event.value("kind", "");
  if (error_kind_ == "comm") blames_others_ = true;
  const std::string message = event.value("message", "");
  if (error_kind_ == "run" && tells_of_memory(message)) out_of_memory_ = message;
}

std::optional<Ending> WorkerProcess::take_exit(const OnLine& on_line, const OnEvent& on_event) {
  siginfo_t info{};
  if (process_.pid == 0 ||
      ::waitid(P_PID, id_t(process_.pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
      info.si_pid == 0)
    return std::nullopt;
  drain(on_line, on_event);  // where this throws, the end is still to be taken
  int status = 0;
  ::waitpid(process_.pid, &status, 0);
  process_.pidfd = UniqueFd();
  return ending_of(status);
}

Ending WorkerProcess::ending_of(int status) const {
  Ending ending;
  if (WIFSIGNALED(status)) ending.signal = WTERMSIG(status);
  if (WIFEXITED(status)) ending.code = WEXITSTATUS(status);
  if (!condemned_.empty())
    ending.cause = condemned_;
  else if (ending.signal != 0)
    ending.cause =
        fmt::format("killed by signal {} ({})", ending.signal, signal_name(ending.signal));
  else
    ending.cause = fmt::format("exited with code {}", ending.code);
  if (ending.signal == SIGKILL && condemned_.empty() &&
      out_of_memory_kills() > memory_kills_before_)
    ending.cause += ", perhaps out of memory: the kernel ended a process of this group";
  else if (!out_of_memory_.empty())
    ending.cause += ", out of memory: " + out_of_memory_;
  ending.suspicion = blames_others_ ? 3 : ending.signal == SIGABRT ? 2 : ending.signal == 0 ? 1 : 0;
  ending.for_good = out_of_memory_.empty() && !error_kind_.empty() && error_kind_ != "comm";
  return ending;
}

std::string stopping_signal(int pid) {
  siginfo_t info{};
  const bool stopped =
      ::waitid(P_PID, id_t(pid), &info, WSTOPPED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid;
  return stopped ? signal_name(info.si_status) : "";
}

}  // namespace lockstep
