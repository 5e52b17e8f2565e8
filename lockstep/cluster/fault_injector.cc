#include "lockstep/cluster/fault_injector.h"

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <new>
#include <nlohmann/json.hpp>
#include <semaphore>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/observe/event.h"

namespace lockstep {
namespace {

// The system's own refusal, for this allocation alone: the address space has an end.
[[noreturn]] void run_out_of_memory() {
  rlimit before{};
  ::getrlimit(RLIMIT_AS, &before);
  rlimit none = before;
  none.rlim_cur = 0;
  ::setrlimit(RLIMIT_AS, &none);
  try {
    for (std::size_t bytes = std::size_t{1} << 20;; bytes *= 2)
      static_cast<void>(::operator new(bytes));
  } catch (...) {
    ::setrlimit(RLIMIT_AS, &before);
    throw;
  }
}

// As a full disk: the kernel lets no file of this process grow (EFBIG instead of ENOSPC).
void fill_disk() {
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit limit{};
  ::getrlimit(RLIMIT_FSIZE, &limit);
  limit.rlim_cur = 0;
  ::setrlimit(RLIMIT_FSIZE, &limit);
}

}  // namespace

FaultInjector::FaultInjector(const World& world)
    : world_(world),
      faults_(faults_from_text(world.place().inject)),
      claimed_(faults_.size(), false) {}

void FaultInjector::strike(Point point, std::uint64_t step) {
  for (std::size_t i = 0; i < faults_.size(); ++i) {
    const Fault& fault = faults_[i];
    if (claimed_[i] || fault.when != point || fault.rank != world_.rank() || step < fault.step)
      continue;
    claimed_[i] = true;
    const std::shared_ptr<Segment> segment = world_.segment();
    if (segment != nullptr && !claim_fault(*segment, static_cast<int>(i))) continue;
    world_.events().emit({{"event", "injected"},
                          {"rank", fault.rank},
                          {"fault", to_text(fault)},
                          {"step", step},
                          {"clock", seconds(Clock::now().time_since_epoch())}});
    execute(fault);
  }
}

void FaultInjector::execute(const Fault& fault) {
  switch (fault.kind) {
    case FaultKind::kill:
      ::kill(::getpid(), fault.signal);
      return;
    case FaultKind::oom_kill:
      ::kill(::getpid(), SIGKILL);
      return;
    case FaultKind::stop:
      ::kill(::getpid(), SIGSTOP);
      return;
    case FaultKind::loop:
      for (volatile bool more = true; more;) continue;
      return;
    case FaultKind::deadlock:
      std::binary_semaphore(0).acquire();
      return;
    case FaultKind::delay:
      std::this_thread::sleep_for(std::chrono::duration<double>(fault.seconds));
      return;
    case FaultKind::mismatch:
      world_.group().barrier({.tag = "injected mismatch"});
      return;
    case FaultKind::out_of_memory:
      run_out_of_memory();
    case FaultKind::full_disk:
      return fill_disk();
    case FaultKind::exit:
      ::_exit(fault.code);
    case FaultKind::throws:
      throw Error("the fault that was asked for: " + to_text(fault));
  }
}

}  // namespace lockstep
