#include "lockstep/collective/comm_queue.h"

#include <fmt/format.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <utility>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

// Short turns for this thread: from Linux 6.12 on, a thread that wakes comes before one that runs
// if its turns are shorter. Otherwise a bucket that is there, or half of whose bytes are, waits for
// the end of a turn of the thread that computes: milliseconds, several times a step. Older kernels
// keep what they do; threads of real-time policies have their own ways.
void take_short_turns() {
  struct {  // the kernel's sched_attr; its header and the C library's don't go together
    std::uint32_t size, policy;
    std::uint64_t flags;
    std::int32_t nice;
    std::uint32_t priority;
    std::uint64_t runtime, deadline, period;  // ns
  } attributes{};
  static_assert(sizeof attributes == 48);
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  attributes.runtime = 100'000;  // the least
  if (attributes.policy == SCHED_OTHER) ::syscall(SYS_sched_setattr, 0, &attributes, 0);
}

constexpr Clock::duration kLeastRecorded = std::chrono::microseconds(20);

}  // namespace

CommQueue::CommQueue(Group& group, FlightRecorder* recorder)
    : group_(group), thread_([this] { work(); }) {
  if (recorder != nullptr) recorder_.emplace(*recorder, "exposed");
  ::pthread_setname_np(thread_.native_handle(), "lockstep-comm");
}

CommQueue::~CommQueue() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    calls_.clear();
  }
  submitted_.notify_one();
  thread_.join();
}

void CommQueue::submit(Call call) {
  {
    const std::lock_guard lock(mutex_);
    if (error_) return;
    calls_.push_back(std::move(call));
  }
  submitted_.notify_one();
}

void CommQueue::wait(Deadline deadline) {
  std::unique_lock lock(mutex_);
  const auto all_over = [&] { return calls_.empty(); };
  const Clock::time_point start = Clock::now();
  bool in_time = true;
  if (deadline.is_never())
    idle_.wait(lock, all_over);
  else
    in_time = idle_.wait_for(lock, deadline.remaining(), all_over);
  const Clock::time_point now = Clock::now();
  statistics_.exposed += now - start;
  if (recorder_ && now - start >= kLeastRecorded) record_wait(start, now);
  if (!in_time)
    throw CommError(fmt::format("rank {}: {} queued collectives were not over in time",
                                group_.rank(), calls_.size()));
  if (!error_) return;
  const std::exception_ptr error = over_ ? error_ : std::exchange(error_, nullptr);
  std::rethrow_exception(error);
}

// Once it is over: until then a rank's last operation is the queue's.
void CommQueue::record_wait(Clock::time_point since, Clock::time_point now) {
  recorder_->claim();
  recorder_->begin(pack({.operation = Operation::wait, .generation = group_.generation()}), {},
                   nanoseconds_of(since));
  recorder_->end(nanoseconds_of(now), now - since, OperationState::done);
}

CommQueue::Statistics CommQueue::statistics() const {
  const std::lock_guard lock(mutex_);
  return statistics_;
}

void CommQueue::work() {
  take_short_turns();
  std::unique_lock lock(mutex_);
  for (;;) {
    submitted_.wait(lock, [&] { return stop_ || !calls_.empty(); });
    if (stop_) return;
    Call call = std::move(calls_.front());
    lock.unlock();
    const Clock::time_point start = Clock::now();
    std::exception_ptr error;
    bool over = false;
    try {
      call(group_);
    } catch (const CommError&) {
      error = std::current_exception();
      over = true;
    } catch (...) {
      error = std::current_exception();
    }
    const Clock::duration took = Clock::now() - start;
    call = nullptr;  // before the owner may go on: it holds what it works on
    lock.lock();
    statistics_.busy += took;
    if (stop_) return;
    if (error) {
      error_ = error;
      over_ = over;
      calls_.clear();
    } else {
      calls_.pop_front();
    }
    if (calls_.empty()) idle_.notify_one();
  }
}

}  // namespace lockstep
