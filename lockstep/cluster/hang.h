// Which members hang: those that get no further for too long while others wait for them, or while
// nobody gets further. Who waits for another is never blamed. Pure, but for sight_of(); one thread.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <vector>

#include "lockstep/base/deadline.h"

namespace lockstep {

class Segment;

// What a member has announced to the others: those at the smallest point wait for nobody, and those
// at a greater one for them.
struct MeetingPoint {
  std::uint64_t joined = 0;  // generation + 1
  std::uint64_t call = 0;
  std::uint64_t phase = 0;
  auto operator<=>(const MeetingPoint&) const = default;
};

struct Sight {
  MeetingPoint point;
  std::uint64_t progress = 0;  // its own work's
  bool operator==(const Sight&) const = default;
};
Sight sight_of(Segment& segment, int seat);

class HangWatch {
 public:
  explicit HangWatch(Clock::duration timeout) : timeout_(timeout) {}

  struct Member {
    std::uint64_t id = 0;
    Sight sight;
  };
  struct Hung {
    std::uint64_t id = 0;
    Clock::duration since{};  // without progress
  };
  // Of all members, seen now; several times within the timeout. Who was not seen before, or not
  // seen lately (this process itself may have been stopped), has just made progress.
  std::vector<Hung> look(const std::vector<Member>& members, Clock::time_point now);

 private:
  struct Seen {
    Sight sight;
    Clock::time_point changed;
  };
  Clock::duration timeout_;
  Clock::time_point looked_{};
  std::map<std::uint64_t, Seen> seen_;
};

}  // namespace lockstep
