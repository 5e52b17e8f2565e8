// Faults that a user asks for, to see a job survive them: `--inject "kill rank=1 step=37"`. Here is
// the grammar; fault_injector.h makes them happen. Pure; plain data; any thread.
//
//   kill          rank= step= [when=] [signal=KILL]   a signal to itself
//   stop          rank= step= [when=]                 SIGSTOP
//   loop          rank= step= [when=]                 computes for ever
//   deadlock      rank= step= [when=]                 sleeps for ever
//   delay         rank= step= seconds= [when=]
//   mismatch      rank= step= [when=]                 announces a call that the others do not make
//   out-of-memory rank= step= [when=]                 allocates until the system refuses
//   oom-kill      rank= step= [when=]                 SIGKILL, as the kernel does it
//   full-disk     step= [rank=0]                      from then on no file of it grows
//   exit          rank= step= code= [when=]
//   throw         rank= step= [when=]                 an exception
//   random        kills= seed= from= to=              so many single kills between two steps
//   kill          every= seed= [for=]                 by the agent: a random member, ever so often
//
// A fault strikes once in the job's life: when the rank makes the step (from 1) or, if the rank was
// not there then, the first one after it. A replacement of a killed rank is spared.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/deadline.h"

namespace lockstep {

enum class FaultKind {
  kill,
  stop,
  loop,
  deadlock,
  delay,
  mismatch,
  out_of_memory,
  oom_kill,
  full_disk,
  exit,
  throws
};

// Moments of a step, in their order.
enum class Point {
  start,       // before anything is computed
  computed,    // its gradients are there, and nobody knows
  sealed,      // its contribution is complete
  decided,     // the step's record is published: it happens, whoever dies
  updating,    // within its slice, with a block half written
  committed,   // the step is whole
  evaluating,  // on the test set, after a step
  checkpoint,  // while its checkpoint is written: rank 0 does
  recovering   // in a new generation, before its first step
};

struct Fault {
  FaultKind kind = FaultKind::kill;
  int rank = 0;
  std::uint64_t step = 1;
  Point when = Point::computed;
  int signal = 9;      // kill
  double seconds = 0;  // delay
  int code = 0;        // exit
  bool operator==(const Fault&) const = default;
};

struct TimedKills {
  double every_s = 1;
  double for_s = 0;  // 0: as long as the job runs
  std::uint64_t seed = 0;
  bool operator==(const TimedKills&) const = default;
};

struct FaultPlan {
  std::vector<Fault> faults;  // at most 256, by the index that claim_fault() takes
  std::vector<TimedKills> timed;
};

// A fault each; empty ones and what follows a # are skipped. `random` becomes single faults of
// ranks 0 to ranks - 1, the same ones for the same seed and bounds. Throws ConfigError with a hint.
FaultPlan parse_faults(std::span<const std::string> lines, int ranks);

// What parse_faults() reads as the same fault.
std::string to_text(const Fault& fault);
// All on a line each, for LOCKSTEP_INJECT, and back.
std::string to_text(std::span<const Fault> faults);
std::vector<Fault> faults_from_text(std::string_view text);

// When TimedKills strike. Time is an argument; it begins with the first call.
class KillTimer {
 public:
  explicit KillTimer(const TimedKills& kills) : kills_(kills) {}
  // The member to kill now, 0 to members - 1, or -1. Kills that nobody asked for in time are lost.
  int due(Clock::time_point now, int members);

 private:
  TimedKills kills_;
  Clock::time_point start_{};
  std::uint64_t done_ = 0;  // intervals that have passed
};

}  // namespace lockstep
