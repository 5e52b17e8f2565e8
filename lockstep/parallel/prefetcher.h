// Batches made ahead by threads of their own and handed out in order: which thread made a batch,
// and how many there are, shows in nothing but the time.
//
// Owner: whoever takes the batches; the destructor waits for those in the making and drops the
// rest. Threads: one takes; `make` runs on the workers' threads, each worker's calls one after
// another.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/base/error.h"

namespace lockstep {

template <typename Batch>
class Prefetcher {
 public:
  using Make = std::function<Batch(int worker, std::uint64_t step)>;

  // Steps [0, steps); at most `ahead` of them (>= 1) are made or in the making before they are
  // taken.
  Prefetcher(std::uint64_t steps, int workers, std::uint64_t ahead, Make make)
      : steps_(steps), ahead_(ahead), make_(std::move(make)) {
    threads_.reserve(static_cast<std::size_t>(workers));
    for (int worker = 0; worker < workers; ++worker)
      threads_.emplace_back([this, worker] { work(worker); });
  }
  ~Prefetcher() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // The next step's batch. Throws what making it threw, or Error at the deadline.
  Batch take(Deadline deadline) {
    std::unique_lock lock(mutex_);
    const auto is_ready = [&] { return made_.contains(taken_); };
    if (deadline.is_never())
      changed_.wait(lock, is_ready);
    else if (!changed_.wait_for(lock, deadline.remaining(), is_ready))
      throw Error("the data loader's batch " + std::to_string(taken_) +
                  " was not made in time; hint: a longer timeout, or more num_workers");
    Made made = std::move(made_.extract(taken_).mapped());
    ++taken_;
    lock.unlock();
    changed_.notify_all();
    if (made.error) std::rethrow_exception(made.error);
    return std::move(*made.batch);
  }

 private:
  struct Made {
    std::optional<Batch> batch;
    std::exception_ptr error;
  };

  void work(int worker) {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock,
                    [&] { return stop_ || claimed_ == steps_ || claimed_ < taken_ + ahead_; });
      if (stop_ || claimed_ == steps_) return;
      const std::uint64_t step = claimed_++;
      lock.unlock();
      Made made;
      try {
        made.batch.emplace(make_(worker, step));
      } catch (...) {
        made.error = std::current_exception();
      }
      lock.lock();
      made_.emplace(step, std::move(made));
      changed_.notify_all();
    }
  }

  const std::uint64_t steps_, ahead_;
  const Make make_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t claimed_ = 0, taken_ = 0;  // steps
  std::map<std::uint64_t, Made> made_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace lockstep
