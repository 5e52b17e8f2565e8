#include "lockstep/cluster/hang.h"

#include <algorithm>

#include "lockstep/memory/control_block.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

Sight sight_of(Segment& segment, int seat) {
  const ControlBlock& block = segment.control(seat);
  return {
      .point = {.joined = block.joined.load(),
                .call = std::max(block.calls[0].words[0].load(), block.calls[1].words[0].load()),
                .phase = block.phase.load()},
      .progress = block.progress.load()};
}

std::vector<HangWatch::Hung> HangWatch::look(const std::vector<Member>& members,
                                             Clock::time_point now) {
  const bool late = now - looked_ > timeout_ / 2;
  looked_ = now;
  std::map<std::uint64_t, Seen> seen;
  for (const Member& member : members) {
    const auto before = seen_.find(member.id);
    const bool same = !late && before != seen_.end() && before->second.sight == member.sight;
    seen[member.id] = {member.sight, same ? before->second.changed : now};
  }
  seen_ = std::move(seen);
  if (seen_.empty()) return {};
  const auto still = [&](const Seen& one) { return now - one.changed >= timeout_; };
  const auto by_point = [](const auto& a, const auto& b) {
    return a.second.sight.point < b.second.sight.point;
  };
  const auto [first, last] = std::minmax_element(seen_.begin(), seen_.end(), by_point);
  const MeetingPoint point = first->second.sight.point;
  const bool awaited = point < last->second.sight.point;
  const bool all =
      std::all_of(seen_.begin(), seen_.end(), [&](const auto& one) { return still(one.second); });
  std::vector<Hung> hung;
  for (const auto& [id, one] : seen_)
    if ((awaited || all) && one.sight.point == point && still(one))
      hung.push_back({id, now - one.changed});
  return hung;
}

}  // namespace lockstep
