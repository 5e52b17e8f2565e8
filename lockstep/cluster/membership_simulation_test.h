// For tests alone: a whole job in one thread and in simulated time. The real Coordinator, the real
// Rosters, and workers that are fibers, so that one may die, freeze or be overtaken between any two
// of its steps. Everything follows from a seed.
//
// Here: fibers, workers and their meetings, nodes, the network, faults. What workers compute is a
// Model's. Who owns what: the Simulation everything. Threads: one.
#pragma once

#include <fmt/format.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/cluster/membership.h"
#include "lockstep/cluster/reconcile.h"

namespace lockstep::simulation {

using namespace std::chrono_literals;

struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The address sanitizer wants to know of every change of the stack.
namespace asan {
#ifdef __SANITIZE_ADDRESS__
inline constexpr auto start_switch = __sanitizer_start_switch_fiber;
inline constexpr auto finish_switch = __sanitizer_finish_switch_fiber;
#else
inline void start_switch(void**, const void*, std::size_t) {}
inline void finish_switch(void*, const void**, std::size_t*) {}
#endif
}  // namespace asan

// A thread of execution that runs when resumed, until it yields. kill() unwinds it from there:
// destructors run, but nothing of what it would still have written is.
class Fiber {
 public:
  struct Killed {};
  explicit Fiber(std::function<void()> body) : body_(std::move(body)), stack_(take_stack()) {
    ::getcontext(&inside_);
    inside_.uc_stack = {.ss_sp = stack_.get(), .ss_flags = 0, .ss_size = kStackBytes};
    inside_.uc_link = &outside_;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    ::makecontext(&inside_, reinterpret_cast<void (*)()>(&enter), 2,
                  static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }
  ~Fiber() {
    try {
      kill();
    } catch (...) {
    }
    stacks().push_back(std::move(stack_));
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume() {
    begun_ = true;
    void* frames = nullptr;
    asan::start_switch(&frames, stack_.get(), kStackBytes);
    ::swapcontext(&outside_, &inside_);
    asan::finish_switch(frames, nullptr, nullptr);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
  void kill() {
    if (begun_ && !done_) {
      killed_ = true;
      resume();
    }
    done_ = true;
  }
  bool done() const { return done_; }
  void yield() {  // from inside
    void* frames = nullptr;
    asan::start_switch(&frames, outside_stack_, outside_bytes_);
    ::swapcontext(&inside_, &outside_);
    asan::finish_switch(frames, &outside_stack_, &outside_bytes_);
    if (killed_) throw Killed{};
  }

 private:
  static constexpr std::size_t kStackBytes = 1 << 20;
  using Stack = std::unique_ptr<char[]>;
  static std::vector<Stack>& stacks() {
    static std::vector<Stack> free;
    return free;
  }
  static Stack take_stack() {
    if (stacks().empty()) return Stack(new char[kStackBytes]);
    Stack stack = std::move(stacks().back());
    stacks().pop_back();
    return stack;
  }
  static void enter(unsigned high, unsigned low) {
    auto* const self = reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(high) << 32 | low);
    asan::finish_switch(nullptr, &self->outside_stack_, &self->outside_bytes_);
    try {
      self->body_();
    } catch (const Killed&) {
    } catch (...) {
      self->error_ = std::current_exception();
    }
    self->done_ = true;
    asan::start_switch(nullptr, self->outside_stack_, self->outside_bytes_);
  }

  std::function<void()> body_;
  Stack stack_;
  ucontext_t inside_, outside_;
  const void* outside_stack_ = nullptr;
  std::size_t outside_bytes_ = 0;
  std::exception_ptr error_;
  bool begun_ = false, done_ = false, killed_ = false;
};

// The group of a generation has failed: over is false if only under this worker (a comm_error).
struct GroupFailed {
  bool over;
};

struct Worker {
  int node = 0, seat = 0;
  std::uint64_t incarnation = 0;
  std::unique_ptr<Fiber> fiber = {};
  std::function<bool()> until = {};  // runs when this is true; empty: at once
  bool alive = true;
  Clock::time_point frozen_until{};  // stopped by a signal
  Clock::time_point frozen_since{};
  bool fails_next_meeting = false;
  bool has_done_its_part = false;  // in the last meeting of a step: nothing is left to write

  GenerationPtr generation = {};  // that it works in; null: in none
  std::size_t rank = 0;
  std::vector<Worker*> group = {};
  std::map<std::uint64_t, std::vector<std::uint64_t>> said = {};  // in a generation's meetings
  std::map<int, std::uint64_t> computed = {};                     // of each virtual rank

  std::size_t size() const { return group.size(); }
};

struct Setup {
  int nodes = 1;
  int seats = 8;  // of a node
  int virtual_ranks = 4;
  std::uint64_t goal = 10;  // steps
  Policy policy;
  int faults = 3;
  double loss = 0;          // of messages
  Clock::duration delay{};  // of messages, at most
  bool coordinator_restarts = false;
};

class Simulation;

// What the workers compute.
class Model {
 public:
  virtual ~Model() = default;
  virtual void recover(Worker& worker) = 0;
  // Makes a step; returns a generation that all members know of.
  virtual std::uint64_t step(Worker& worker) = 0;
  virtual std::uint64_t committed(int node) = 0;
  virtual void reset_seat(int node, int seat) = 0;
};

class Simulation {
 public:
  Simulation(std::uint64_t seed, const Setup& setup, bool print)
      : setup_(setup), random_(seed), print_(print) {
    coordinator_ = std::make_unique<Coordinator>(setup.policy, now_);
    for (int i = 0; i < setup.nodes; ++i) add_node();
    Clock::time_point when = now_;
    for (int i = 0; i < setup.faults; ++i) {
      when += up_to(up_to(1) == 0 ? 30 : 150) * 1ms;
      faults_.push_back(when);
      if (up_to(4) == 0) faults_.push_back(when);  // two at once
    }
  }
  ~Simulation() { workers_.clear(); }

  // Until the job has ended. Throws Violation.
  JobEnd run(Model& model);

  // --- For models, inside a worker ---
  void instant(Worker& worker) { worker.fiber->yield(); }
  // Everybody of the generation has come; what they said.
  std::vector<std::uint64_t> meet(Worker& worker, std::uint64_t word = 0);
  std::uint64_t newest_generation(int node) const { return nodes_.at(node).published->number; }
  // Nobody is at work in an older generation.
  void check_alone(const Worker& worker);
  // This worker has seen `step` committed. first: it is the one that did it.
  void committed(Worker& worker, std::uint64_t step);

  std::uint64_t up_to(std::uint64_t most) { return random_() % (most + 1); }
  template <typename... Args>
  void log(fmt::format_string<Args...> format, Args&&... args) {
    if (print_)
      fmt::print("{:6} ms  {}\n", (now_ - Clock::time_point{}) / 1ms,
                 fmt::format(format, std::forward<Args>(args)...));
  }
  const Setup& setup() const { return setup_; }

  int kills = 0, freezes = 0, partitions = 0, generations = 0;

 private:
  struct Node {
    explicit Node(Roster what) : roster(std::move(what)) {}
    Roster roster;
    GenerationPtr published;
    std::uint64_t over = 0;
    bool alive = true;
    Clock::time_point cut_until{};  // from the network
    Clock::time_point report_at{};
  };

  void add_node() {
    const int id = next_node_++;
    nodes_.try_emplace(id,
                       Roster(id, setup_.seats, setup_.nodes > 1 ? 120ms : Clock::duration::max()));
  }
  void later(Clock::duration delay, std::function<void()> what) {
    events_.emplace(now_ + delay, std::move(what));
  }
  void send(int node, std::function<void()> what);
  void report(int id);
  void answer(int id);
  void decide();
  void execute(int id, const NodePlan& plan);
  void start(int id, int seat);
  void kill(Worker& worker, const std::string& cause);
  void work(Worker& worker, Model& model);
  bool enter(Worker& worker, bool failed);
  void wait(Worker& worker, std::function<bool()> condition) {
    worker.until = std::move(condition);
    worker.fiber->yield();
  }
  void look_for_frozen();
  void fault();
  void run_workers();
  void check_fenced(const JobGeneration& next);
  Worker* any_worker();
  bool chance(double of) { return static_cast<double>(random_() % 1000) < of * 1000; }

  Setup setup_;
  std::mt19937_64 random_;
  bool print_;
  Clock::time_point now_{};
  std::unique_ptr<Coordinator> coordinator_;  // null: it is down
  std::uint64_t term_ = 0;
  std::optional<Clock::time_point> again_;
  std::map<int, Node> nodes_;
  int next_node_ = 0;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::map<std::pair<int, std::uint64_t>, Worker*> by_name_;
  std::multimap<Clock::time_point, std::function<void()>> events_;
  std::vector<Clock::time_point> faults_;
  Clock::time_point last_fault_{};
  std::uint64_t newest_to_commit_ = 0;
  std::optional<JobEnd> end_;
  Model* model_ = nullptr;
  int next_pid_ = 100;
  int failures_left_ = 1;
};

}  // namespace lockstep::simulation
