// One process that the agent started: what it writes and how it ended, in words. Owns its streams;
// the process itself is ended by the agent. One thread.
#pragma once

#include <deque>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/cluster/line_splitter.h"
#include "lockstep/cluster/spawn.h"
#include "lockstep/observe/event.h"

namespace lockstep {

enum class Stream { output, error, events };

// How a process ended.
struct Ending {
  int signal = 0, code = 0;
  std::string cause;  // "killed by signal 9 (SIGKILL)", "exited with code 3"
  // Lower is more likely the cause of what followed: a signal; an exit code; an abort, which is
  // also how an uncaught CommError ends; a worker that said itself that another one failed.
  int suspicion = 0;
  // It found its input wrong, or failed on its own account: it would again.
  bool for_good = false;
};

class WorkerProcess {
 public:
  using OnLine = std::function<void(bool error, std::string_view line)>;
  using OnEvent = std::function<void(const nlohmann::json& event)>;  // empty: they are not read

  WorkerProcess() = default;
  // What it writes; its process may come later.
  explicit WorkerProcess(Streams streams) : streams_(std::move(streams)) {}
  void started(Process process) { process_ = std::move(process); }

  int rank = 0;  // for messages; the agent's to set
  int pid() const { return process_.pid; }
  const Process& process() const { return process_; }
  const UniqueFd& stream(Stream stream) const;
  const std::deque<std::string>& last_words() const { return last_words_; }

  // One read; false at the end of the stream or when nothing is there. Throws Error for an event
  // that is none or lacks a member, and what the callbacks throw.
  bool read_some(Stream stream, const OnLine& on_line, const OnEvent& on_event);
  // What is in its pipes; a child of it may hold them open and write on.
  void drain(const OnLine& on_line, const OnEvent& on_event);
  void finish_lines(const OnLine& on_line);  // the last ones, which have no end
  // Reaps it and reads what it wrote before. Nothing while it runs.
  std::optional<Ending> take_exit(const OnLine& on_line, const OnEvent& on_event);

  // A cause that the agent knows: why it kills it.
  void condemn(std::string cause) { condemned_ = std::move(cause); }
  bool is_condemned() const { return !condemned_.empty(); }

 private:
  Ending ending_of(int status) const;
  void note(const nlohmann::json& event);
  void take_events(std::string_view bytes, const OnEvent& on_event);

  Process process_;
  Streams streams_;
  LineSplitter output_lines_, error_lines_;
  EventReader events_;
  std::deque<std::string> last_words_;
  std::string condemned_, error_kind_, out_of_memory_;
  bool blames_others_ = false;
  std::uint64_t memory_kills_before_ = out_of_memory_kills();
};

// "SIGSTOP" if it is stopped; "" if it is not. Of a child.
std::string stopping_signal(int pid);

}  // namespace lockstep
