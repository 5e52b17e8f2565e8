// kill -9 at any instant of a step, by real processes over shared memory: what is left finishes the
// step or computes it again, with the right bits.
#include "lockstep/update/recovery.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <random>

#include "lockstep/base/file.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/update/update_case_test.h"

namespace lockstep {
namespace {

constexpr int kMaxWorkers = 64;  // that a trial ever starts
constexpr int kMaxRanks = 5;
constexpr int kTimeoutMs = 60'000;  // only a bug lets it pass

// --- The group that the workers have here: meetings, ended by the parent when somebody dies ---

struct Control {
  std::atomic<std::uint32_t> bell;
  std::atomic<std::uint64_t> generation;  // odd while the parent changes the members
  std::atomic<std::uint32_t> size;        // 0: go home
  std::array<std::atomic<int>, kMaxRanks> members;
  std::array<std::atomic<std::uint64_t>, kMaxWorkers> met;  // generation << 32 | meetings
};

struct Generation {
  std::uint64_t number = 0;
  std::vector<int> members;  // worker ids by rank
};

struct GenerationOver {};

class Meetings {
 public:
  // `last` is the generation that was, when the worker was started.
  Meetings(Control& control, int id, std::uint64_t last)
      : control_(control), id_(id), generation_{.number = last, .members = {}} {}

  // Waits for a generation after the last one.
  Generation join() {
    Generation next;
    for (;;) {
      const std::uint32_t seen = control_.bell;
      next.number = control_.generation;
      next.members.clear();
      for (std::uint32_t rank = 0; rank < control_.size; ++rank)
        next.members.push_back(control_.members[rank]);
      if (next.number != generation_.number && next.number % 2 == 0 &&
          next.number == control_.generation)
        break;
      sleep_on(control_.bell, seen, std::chrono::seconds(1));
    }
    generation_ = next;
    meetings_ = 0;
    return next;
  }
  void meet() {
    const std::uint64_t mine = generation_.number << 32 | ++meetings_;
    control_.met[static_cast<std::size_t>(id_)] = mine;
    ring(control_.bell);
    wait([&] {
      return std::all_of(generation_.members.begin(), generation_.members.end(), [&](int member) {
        const std::uint64_t theirs = control_.met[static_cast<std::size_t>(member)];
        return theirs >> 32 == generation_.number && theirs >= mine;
      });
    });
  }
  [[noreturn]] void wait_for_the_next_generation() {
    wait([] { return false; });
    throw GenerationOver{};
  }

 private:
  template <typename Condition>
  void wait(Condition&& condition) {
    for (;;) {
      const std::uint32_t seen = control_.bell;
      if (condition()) return;
      if (control_.generation != generation_.number) throw GenerationOver{};
      sleep_on(control_.bell, seen, std::chrono::seconds(1));
    }
  }

  Control& control_;
  int id_;
  Generation generation_;
  std::uint64_t meetings_ = 0;
};

// --- A worker ---

// Ends its process at one of the instants that it is told of.
struct Fuse {
  long in_steps = -1;     // how many instants are left; negative: never
  long in_recovery = -1;  // likewise, of recoveries
  static void burn(long& left) {
    if (left >= 0 && left-- == 0) ::kill(::getpid(), SIGKILL);
  }
};

class Worker {
 public:
  Worker(const UpdateCase& what, const CaseMemory& memory, Control& control, int id,
         std::uint64_t last_generation, Fuse fuse, int report)
      : case_(what),
        memory_(memory),
        state_(memory.state()),
        update_(what.spec, state_),
        control_(control),
        meetings_(control, id, last_generation),
        id_(id),
        fuse_(fuse),
        report_(report) {}

  void run(std::uint64_t goal) {
    for (;;) {
      generation_ = meetings_.join();
      if (generation_.members.empty()) return;
      const auto me = std::find(generation_.members.begin(), generation_.members.end(), id_);
      rank_ = static_cast<std::size_t>(me - generation_.members.begin());
      try {
        finish_old_step();
        while (state_.committed() < goal) step();
        const std::uint64_t done = generation_.number;
        LOCKSTEP_CHECK(::write(report_, &done, sizeof done) == sizeof done);
        meetings_.wait_for_the_next_generation();
      } catch (const GenerationOver&) {
      }
    }
  }

 private:
  void finish_old_step() {
    meetings_.meet();
    const RecoveryPlan plan =
        plan_recovery(recovery_state(state_, case_.spec), generation_.members.size());
    Fuse::burn(fuse_.in_recovery);
    recover(update_, plan, rank_, memory_.contributions(),
            [&](auto, auto) { Fuse::burn(fuse_.in_recovery); });
    const std::uint64_t decided = state_.decided();  // before anybody can decide the next
    meetings_.meet();
    Fuse::burn(fuse_.in_recovery);
    if (plan.action == RecoveryPlan::Action::finish)
      state_.commit(state_.record(decided, case_.spec));
  }

  void step() {
    const int ranks = static_cast<int>(generation_.members.size());
    const auto runs = partition_virtual_ranks(case_.virtual_ranks, ranks);
    const StepRecord last = state_.record(state_.committed(), case_.spec);
    StepRecord record = case_.plan(last, runs, ranks);
    const auto instant = [&] { Fuse::burn(fuse_.in_steps); };
    instant();
    memory_.contribute(case_, record.step, static_cast<int>(rank_), runs[rank_], instant);
    state_.seal(static_cast<int>(rank_), record.step);
    instant();
    meetings_.meet();
    if (case_.max_norm > 0) {
      update_.measure(record, memory_.contributions(), rank_);
      instant();
      meetings_.meet();
      clip(record, update_.squares(), case_.max_norm);
    }
    instant();
    if (rank_ == 0) state_.decide(record);
    instant();
    meetings_.meet();
    record = state_.record(record.step, case_.spec);
    update_.run(record, memory_.contributions(), rank_, [&](auto, auto) { instant(); });
    meetings_.meet();
    instant();
    state_.commit(record);
    instant();
  }

  const UpdateCase& case_;
  const CaseMemory& memory_;
  SharedState state_;
  SliceUpdate update_;
  Control& control_;
  Meetings meetings_;
  int id_;
  Fuse fuse_;
  int report_;
  Generation generation_;
  std::size_t rank_ = 0;
};

// --- The parent: starts workers, sees them die, makes generations ---

class Trial {
 public:
  Trial(const UpdateCase& what, std::uint64_t goal)
      : case_(what),
        goal_(goal),
        memory_(what, kMaxRanks),
        control_memory_(sizeof(Control)),
        control_(*reinterpret_cast<Control*>(control_memory_.span().data())) {
    LOCKSTEP_CHECK(::pipe2(report_, O_CLOEXEC) == 0);
  }
  ~Trial() {
    for (auto& [id, worker] : alive_) {
      ::kill(worker.pid, SIGKILL);
      ::waitpid(worker.pid, nullptr, 0);
    }
    for (const int end : report_) ::close(end);
  }

  void start(Fuse fuse = {}) {
    const int id = next_id_++;
    LOCKSTEP_CHECK(id < kMaxWorkers);
    const std::uint64_t generation = control_.generation;
    const pid_t parent = ::getpid();
    const pid_t pid = ::fork();
    LOCKSTEP_CHECK(pid >= 0);
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(3);
      try {
        Worker(case_, memory_, control_, id, generation, fuse, report_[1]).run(goal_);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "worker %d: %s\n", id, error.what());
        ::_exit(2);
      }
      ::_exit(0);
    }
    alive_[id] = {pid, UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)))};
  }
  void begin_generation() { publish(static_cast<std::uint32_t>(alive_.size())); }

  void kill(int index) {
    auto worker = alive_.begin();
    std::advance(worker, static_cast<long>(static_cast<std::size_t>(index) % alive_.size()));
    ::kill(worker->second.pid, SIGKILL);
  }

  enum class Event { deaths, done };
  // Until somebody has died (and is fenced), or everybody is done.
  Event wait() {
    for (std::size_t done = 0;;) {
      std::vector<pollfd> polled{{report_[0], POLLIN, 0}};
      for (auto& [id, worker] : alive_) polled.push_back({worker.exit.get(), POLLIN, 0});
      if (::poll(polled.data(), polled.size(), kTimeoutMs) < 1) throw Error("nothing happened");
      if (const int killed = reap(0); killed != 0) {
        (state().decided() != state().committed() ? forward_ : back_) += killed;
        return Event::deaths;
      }
      if (polled[0].revents == 0) continue;
      std::uint64_t generation = 0;
      LOCKSTEP_CHECK(::read(report_[0], &generation, sizeof generation) == sizeof generation);
      done += generation == control_.generation ? 1 : 0;
      if (done == alive_.size()) return Event::done;
    }
  }
  void send_home() {
    publish(0);
    while (!alive_.empty()) reap(-1);
  }

  std::size_t alive() const { return alive_.size(); }
  int deaths() const { return forward_ + back_; }
  int forward() const { return forward_; }
  SharedState state() const { return memory_.state(); }

 private:
  struct Process {
    pid_t pid = -1;
    UniqueFd exit;
  };

  void publish(std::uint32_t size) {
    ++control_.generation;
    std::uint32_t rank = 0;
    for (auto& [id, worker] : alive_) control_.members[rank++] = id;
    control_.size = size;
    ++control_.generation;
    ring(control_.bell);
  }

  // How many were killed. wait: 0 takes those that have ended, -1 waits for the first.
  int reap(int wait) {
    int killed = 0;
    for (auto worker = alive_.begin(); worker != alive_.end();) {
      int status = 0;
      if (::waitpid(worker->second.pid, &status, wait == 0 ? WNOHANG : 0) == 0) {
        ++worker;
        continue;
      }
      worker = alive_.erase(worker);
      if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
        ++killed;
      else if (status != 0)
        throw Error("a worker failed: see its message");
    }
    return killed;
  }

  const UpdateCase& case_;
  std::uint64_t goal_;
  CaseMemory memory_;
  SharedMemory control_memory_;
  Control& control_;
  int report_[2] = {-1, -1};
  std::map<int, Process> alive_;
  int next_id_ = 0;
  int forward_ = 0;  // deaths between a decision and its commit
  int back_ = 0;
};

// --- The tests ---

constexpr std::uint64_t kGoal = 5;

std::vector<UpdateCase> make_cases() {
  constexpr std::uint64_t kElements = 7 * 1024 + 500;
  const std::vector<UpdateRange> ranges = {
      {0, 1100, 0}, {1100, 3000, 1}, {3000, 3010, UpdateRange::kAverage}, {3020, kElements, 0}};
  const auto spec = [&](const OptimizerOptions& a, const OptimizerOptions& b) {
    return UpdateSpec{.elements = kElements, .groups = {a, b}, .ranges = ranges};
  };
  return {{.spec = spec(Adam{.lr = 0.01}, AdamW{.lr = 0.01}), .virtual_ranks = 5},
          {.spec = spec(SGD{.momentum = 0.9}, SGD{}), .virtual_ranks = 6, .max_norm = 0.5},
          {.spec = spec(RMSprop{.momentum = 0.9, .centered = true}, Adagrad{}),
           .virtual_ranks = 5,
           .max_norm = 0.5}};
}

struct Deaths {
  int all = 0;
  int forward = 0;
};

// Workers until the goal, with whatever deaths `random` brings.
Deaths random_trial(const UpdateCase& what, const naive::Weights& expected,
                    std::mt19937_64& random) {
  const auto up_to = [&](long most) { return static_cast<long>(random() % (most + 1)); };
  Trial trial(what, kGoal);
  const long workers = 1 + up_to(kMaxRanks - 1);
  const long instants = kGoal * (64 / workers * 7 + 20);  // about as many as a worker passes
  const bool asynchronous = up_to(2) == 0;
  for (long i = 0; i < workers; ++i)
    trial.start(asynchronous ? Fuse{}
                             : Fuse{.in_steps = up_to(2) == 0 ? up_to(instants) : -1,
                                    .in_recovery = up_to(3) == 0 ? up_to(200) : -1});
  for (;;) {
    trial.begin_generation();
    if (asynchronous && trial.deaths() < 3)
      for (long kills = 1 + up_to(1); kills > 0; --kills) {
        const long spin = up_to(1'500'000);
        for (long i = 0; i < spin; ++i) asm volatile("");
        trial.kill(static_cast<int>(up_to(100)));
      }
    if (trial.wait() == Trial::Event::done) break;
    while (trial.alive() == 0 || (trial.alive() < kMaxRanks && up_to(2) == 0)) trial.start();
  }
  trial.send_home();
  EXPECT_EQ(trial.state().committed(), kGoal);
  EXPECT_TRUE(same_bits(trial.state(), expected));
  return {trial.deaths(), trial.forward()};
}

std::uint64_t make_seed() {
  const int asked = testing::UnitTest::GetInstance()->random_seed();  // --gtest_random_seed
  return asked != 0 ? static_cast<std::uint64_t>(asked) : std::random_device{}();
}

TEST(Recovery, AnyDeathAtAnyInstantLeavesWholeStepsWithTheRightBits) {
  const std::vector<UpdateCase> cases = make_cases();
  std::vector<naive::Weights> expected;
  for (const UpdateCase& one : cases) expected.push_back(one.twin_after(kGoal));
  const std::uint64_t seed = make_seed();
  std::printf("seed %lu\n", static_cast<unsigned long>(seed));
  std::fflush(stdout);
  Deaths deaths;
  // Enough of both kinds: inside the update pass, and outside.
  for (std::uint64_t trial = 0;
       std::min(deaths.forward, deaths.all - deaths.forward) < 200 && !HasFailure(); ++trial) {
    SCOPED_TRACE(testing::Message() << "seed " << seed << " trial " << trial);
    std::mt19937_64 random(seed + trial);
    const Deaths more =
        random_trial(cases[trial % cases.size()], expected[trial % cases.size()], random);
    deaths.all += more.all;
    deaths.forward += more.forward;
  }
  std::printf("%d deaths, %d of them inside the update pass\n", deaths.all, deaths.forward);
}

}  // namespace
}  // namespace lockstep
