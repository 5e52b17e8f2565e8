// One thread over one group that makes collectives asynchronous, in order: they run while the
// owner computes. Pays between nodes, where a call mostly waits for the link; on one node the
// thread only takes a core from those that compute. It asks the kernel to run it at once whenever
// it has something to do, in turns too short to hold up who computes on its core.
//
// Owner: one thread, which submits and waits; the group outlives the queue. Between submit() and
// wait() the group, and what the calls touch, belong to the queue's thread.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>

#include "lockstep/base/deadline.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/operation_record.h"

namespace lockstep {

class CommQueue {
 public:
  using Call = std::function<void(Group&)>;

  // recorder: where a wait() that lasts is recorded, as an operation of a group "exposed"; lives as
  // long as the queue.
  explicit CommQueue(Group& group, FlightRecorder* recorder = nullptr);
  // Waits for the call that runs; those that have not begun are dropped.
  ~CommQueue();
  CommQueue(const CommQueue&) = delete;
  CommQueue& operator=(const CommQueue&) = delete;

  // The call runs when those before it are over; it is destroyed when it has run. After one that
  // failed, none runs until wait() has said so. Never waits, never throws what a call threw.
  void submit(Call call);
  // Returns when all calls are over. Throws what the first that failed threw: a CommError again and
  // again, because the group is over; anything else once. Each collective has a deadline of its
  // own, so that this wait ends without one; with one: CommError.
  void wait(Deadline deadline = Deadline::never());

  struct Statistics {
    Clock::duration busy{};     // inside calls
    Clock::duration exposed{};  // of that: the owner inside wait()
  };
  Statistics statistics() const;

 private:
  void work();

  void record_wait(Clock::time_point since, Clock::time_point now);

  Group& group_;
  std::optional<OperationRecorder> recorder_;
  mutable std::mutex mutex_;
  std::condition_variable submitted_, idle_;
  std::deque<Call> calls_;  // the first one stays until it is over
  std::exception_ptr error_;
  bool over_ = false;  // the error is for good
  bool stop_ = false;
  Statistics statistics_;
  std::thread thread_;
};

}  // namespace lockstep
