#include "lockstep/cluster/membership_wire.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <set>

#include "lockstep/base/error.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Member, node, seat, incarnation, pid, address)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(JobGeneration, number, members, leaving, over, reason)

}  // namespace lockstep

namespace nlohmann {  // none: null

template <typename T>
struct adl_serializer<std::optional<T>> {
  static void to_json(json& to, const std::optional<T>& value) {
    if (value) to = *value;
  }
  static void from_json(const json& from, std::optional<T>& value) {
    if (!from.is_null()) value = from.get<T>();
  }
};
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

// The conversions take any number for any other: none here has a point, or a sign but for -1.
void check_numbers(const json& value) {
  if (value.is_number_float() || (value.is_number_integer() && value < -1))
    throw ConfigError(fmt::format("{} counts nothing", value.dump()));
  if (value.is_structured())
    for (const json& part : value) check_numbers(part);
}

template <typename T>
T read(const json& object) {
  check_numbers(object);
  try {
    return object.get<T>();
  } catch (const json::exception& error) {
    throw ConfigError(error.what());
  }
}

void check(const char* what, auto value, std::uint64_t most) {
  if (static_cast<std::uint64_t>(value) > most)
    throw ConfigError(fmt::format("'{}' is {}, at most {}", what, value, most));
}
void check(const char* what, const std::optional<std::uint64_t>& value, std::uint64_t most) {
  if (value) check(what, *value, most);
}

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
  auto report = read<NodeReport>(object);
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
  auto assignment = read<Assignment>(object);
  check("over", assignment.over, kMostGenerations);
  check("start", assignment.start, kMostIncarnations);
  check("kill", assignment.kill.size(), kMaxSeats);
  check("taken_up", assignment.taken_up, kMostGenerations);
  check_generation(assignment.generation);
  return assignment;
}

}  // namespace lockstep
