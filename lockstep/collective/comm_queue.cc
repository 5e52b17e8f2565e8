#include "lockstep/collective/comm_queue.h"

#include <fmt/format.h>
#include <pthread.h>

#include <utility>

#include "lockstep/base/error.h"

namespace lockstep {

CommQueue::CommQueue(Group& group) : group_(group), thread_([this] { work(); }) {
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
  statistics_.exposed += Clock::now() - start;
  if (!in_time)
    throw CommError(fmt::format("rank {}: {} queued collectives were not over in time",
                                group_.rank(), calls_.size()));
  if (!error_) return;
  const std::exception_ptr error = over_ ? error_ : std::exchange(error_, nullptr);
  std::rethrow_exception(error);
}

CommQueue::Statistics CommQueue::statistics() const {
  const std::lock_guard lock(mutex_);
  return statistics_;
}

void CommQueue::work() {
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
