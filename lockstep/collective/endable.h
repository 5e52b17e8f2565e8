// A group that a group above it can end: when the other one below it has failed.
#pragma once

#include <exception>
#include <string>

namespace lockstep {

class Endable {
 public:
  virtual ~Endable() = default;
  // On all ranks, unless it is over already. Does not wait for anybody.
  virtual void end_group(const std::string& why) noexcept = 0;
};

template <typename Meeting>
void end_quietly(Meeting& meeting, const std::string& why) noexcept {
  try {
    meeting.check_open();
    meeting.fail(why);
  } catch (const std::exception&) {  // it was over, or is now
  }
}

}  // namespace lockstep
