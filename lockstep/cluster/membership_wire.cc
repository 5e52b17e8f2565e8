#include "lockstep/cluster/membership_wire.h"

#include <set>

#include "lockstep/cluster/json_reading.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Member, node, seat, incarnation, pid, address)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(JobGeneration, number, members, leaving, over, reason)

}  // namespace lockstep

namespace nlohmann {

template <>
struct adl_serializer<lockstep::GenerationPtr> {
  static void to_json(json& to, const lockstep::GenerationPtr& value) {
    if (value) to = *value;
  }
  static void from_json(const json& from, lockstep::GenerationPtr& value) {
    using lockstep::JobGeneration;
    if (!from.is_null()) value = std::make_shared<JobGeneration>(from.get<JobGeneration>());
  }
};

}  // namespace nlohmann

namespace lockstep {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(WorkerReport, seat, incarnation, pid, state, cause,
                                   failed_for_good, comm_error, message, listed, address)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(NodeReport, node, rank, host, version, room, started, workers,
                                   generation, committed, taken_up)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(JobEnd, ok, reason)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Assignment, term, acknowledged, generation, over, start, kill,
                                   taken_up, end)

namespace {

using nlohmann::json;

// Far above what a job can have: so that nobody is made to count to it.
constexpr std::uint64_t kMostIncarnations = 1 << 20, kMostMembers = 1 << 17, kMostNodes = 1 << 30;
constexpr std::uint64_t kMostGenerations = std::uint64_t{1} << 62, kMostPid = 1 << 30;

// What a Member and a WorkerReport have alike.
void check_worker(const auto& worker) {
  check("seat", worker.seat, kMaxSeats - 1);
  check("incarnation", worker.incarnation, kMostIncarnations);
  check("pid", worker.pid, kMostPid);
  check("bytes of an address", worker.address.size(), kMaxAddressBytes);
}

void check_members(const std::vector<Member>& members) {
  check("members", members.size(), kMostMembers);
  std::set<std::pair<int, std::uint64_t>> seen;
  for (const Member& member : members) {
    check_worker(member);
    check("node", member.node, kMostNodes);
    if (!seen.empty() && member.node < seen.rbegin()->first)
      throw ConfigError("members are not sorted by node");
    if (!seen.emplace(member.node, member.incarnation).second)
      throw ConfigError("a member is there twice");
  }
}

void check_generation(const GenerationPtr& generation) {
  if (!generation) return;
  check("number", generation->number, kMostGenerations);
  check("over", generation->over, kMostGenerations);
  check_members(generation->members);
  check_members(generation->leaving);
}

}  // namespace

json to_json(const NodeReport& report) { return report; }
json to_json(const Assignment& assignment) { return assignment; }

NodeReport node_report_from(const json& object) {
  auto report = read_json<NodeReport>(object);
  check("node", report.node, kMostNodes);
  check("rank", report.rank + 1, kMostNodes);
  check("room", report.room, kMaxSeats);
  check("started", report.started, kMostIncarnations);
  check("workers", report.workers.size(), kMaxSeats);
  check("taken_up", report.taken_up, kMostGenerations);
  std::set<std::uint64_t> seen;
  for (const WorkerReport& worker : report.workers) {
    check_worker(worker);
    check("state", static_cast<int>(worker.state), static_cast<int>(WorkerState::failed));
    check("comm_error", worker.comm_error, kMostGenerations);
    check("listed", worker.listed, kMostGenerations);
    if (worker.incarnation >= report.started || !seen.insert(worker.incarnation).second)
      throw ConfigError(
          fmt::format("worker {} was not started, or is there twice", worker.incarnation));
  }
  check_generation(report.generation);
  return report;
}

Assignment assignment_from(const json& object) {
  auto assignment = read_json<Assignment>(object);
  check("over", assignment.over, kMostGenerations);
  check("start", assignment.start, kMostIncarnations);
  check("kill", assignment.kill.size(), kMaxSeats);
  check("taken_up", assignment.taken_up, kMostGenerations);
  check_generation(assignment.generation);
  return assignment;
}

}  // namespace lockstep
