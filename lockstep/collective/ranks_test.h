// For tests alone: runs a function as every rank of a group, as threads or as forked processes.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/collective/group.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

// The thread sanitizer doesn't see what other processes do, and breaks when one of several threads
// forks: it gets the same tests with ranks as threads alone.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

// Long enough for a loaded machine; only a bug lets it pass.
inline constexpr std::chrono::seconds kTestTimeout{60};

template <typename Function>
std::string error_of(Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

inline std::shared_ptr<Segment> make_segment(int ranks, std::uint64_t arena_bytes = 256 << 20) {
  return Segment::create({.seats = ranks, .arena_bytes = arena_bytes});
}

// body(rank) on a thread for each rank; an exception that escapes is a failure of the test.
inline void run_threads(int ranks, const std::function<void(int)>& body) {
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&body, rank] {
      try {
        body(rank);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
      }
    });
}

// Until somebody sleeps on the rank's bell. Whoever does says so again in every slice; what was
// said before may be about a sleep that is over.
inline void await_sleeper(Segment& segment, int rank) {
  const Deadline deadline = Deadline::after(kTestTimeout);
  auto& waiting = segment.control(rank).waiting;
  waiting.store(0);
  while (waiting.load() == 0 && !deadline.expired()) std::this_thread::yield();
}

// Ranks that are forked processes. A child ends with its body; what is left at the end is killed.
class Processes {
 public:
  // report(line) hands a line of text to the parent.
  using Report = std::function<void(const std::string&)>;
  using Body = std::function<void(const std::shared_ptr<Segment>&, const Report&)>;

  explicit Processes(std::shared_ptr<Segment> segment) : segment_(std::move(segment)) {}
  ~Processes() {
    for (auto& [rank, child] : children_)
      if (child.pid > 0) {
        ::kill(child.pid, SIGKILL);
        ::waitpid(child.pid, nullptr, 0);
      }
  }
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  // The child attaches the segment through a descriptor of its own, as a worker does.
  void start(int rank, const Body& body) {
    int ends[2];
    LOCKSTEP_CHECK(::pipe2(ends, O_CLOEXEC) == 0);
    const pid_t parent = ::getpid();
    std::fflush(stdout);  // or the child would print it again
    const pid_t pid = ::fork();
    LOCKSTEP_CHECK(pid >= 0);
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(3);
      ::_exit(run_child(body, ends[1]));
    }
    ::close(ends[1]);
    children_[rank] = {pid, UniqueFd(ends[0])};
  }

  pid_t pid(int rank) const { return children_.at(rank).pid; }
  void signal(int rank, int number) { ::kill(children_.at(rank).pid, number); }

  // The next line the child reported; "" if it ended without one.
  std::string line(int rank) {
    std::string text;
    for (char byte = 0;;) {
      pollfd wait{children_.at(rank).from.get(), POLLIN, 0};
      const int limit_ms = static_cast<int>(std::chrono::milliseconds(kTestTimeout).count());
      if (::poll(&wait, 1, limit_ms) != 1) return "nothing was reported in time";
      if (::read(wait.fd, &byte, 1) != 1 || byte == '\n') return text;
      text += byte;
    }
  }
  // Waits for the child's end; its wait status.
  int join(int rank) {
    int status = -1;
    ::waitpid(children_.at(rank).pid, &status, 0);
    children_.at(rank).pid = -1;
    return status;
  }

 private:
  struct Child {
    pid_t pid = -1;
    UniqueFd from;
  };

  int run_child(const Body& body, int to) {
    const Report report = [&](const std::string& line) {
      write_all(to, as_byte_span(line + "\n"));
    };
    try {
      body(Segment::attach(UniqueFd(::dup(segment_->fd()))), report);
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
    std::fflush(stdout);
    return ::testing::Test::HasFailure() ? 1 : 0;
  }

  std::shared_ptr<Segment> segment_;
  std::map<int, Child> children_;
};

}  // namespace lockstep
