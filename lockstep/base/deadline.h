// A point in time by which a wait must have ended. A value; any thread.
#pragma once

#include <chrono>
#include <cstdint>

namespace lockstep {

using Clock = std::chrono::steady_clock;

class Deadline {
 public:
  static Deadline after(Clock::duration timeout) { return Deadline(Clock::now() + timeout); }
  static Deadline at(Clock::time_point when) { return Deadline(when); }
  static Deadline never() { return Deadline(Clock::time_point::max()); }

  bool is_never() const { return when_ == Clock::time_point::max(); }
  bool expired(Clock::time_point now = Clock::now()) const { return now >= when_; }
  // Zero once expired.
  Clock::duration remaining(Clock::time_point now = Clock::now()) const {
    return now >= when_ ? Clock::duration::zero() : when_ - now;
  }

 private:
  explicit Deadline(Clock::time_point when) : when_(when) {}
  Clock::time_point when_;
};

// Of the monotonic clock.
inline std::int64_t nanoseconds_of(Clock::time_point when) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count();
}
inline double seconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace lockstep
