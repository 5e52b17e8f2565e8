#include "lockstep/cluster/membership_wire.h"

#include <fmt/format.h>

#include <set>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

using nlohmann::json;

// Far above what a job can have: so that nobody is made to count to it.
constexpr std::uint64_t kMostIncarnations = 1 << 20, kMostMembers = 1 << 17, kMostNodes = 1 << 30;
constexpr std::uint64_t kMostGenerations = std::uint64_t{1} << 62, kMostPid = 1 << 30;

std::uint64_t number(const json& object, const char* member, std::uint64_t most) {
  const std::uint64_t value = whole_in(object, member);
  if (value > most) throw ConfigError(fmt::format("'{}' is {}, at most {}", member, value, most));
  return value;
}

int small(const json& object, const char* member, std::uint64_t most) {
  return static_cast<int>(number(object, member, most));
}

bool flag(const json& object, const char* member) {
  const auto found = object.find(member);
  if (found == object.end() || !found->is_boolean())
    throw ConfigError(fmt::format("it has no '{}' that is true or false", member));
  return found->get<bool>();
}

std::optional<std::uint64_t> generation_number(const json& object, const char* member) {
  if (!object.contains(member)) return std::nullopt;
  return number(object, member, kMostGenerations);
}

const json& list(const json& object, const char* member, std::size_t most) {
  const auto found = object.find(member);
  if (found == object.end() || !found->is_array() || found->size() > most)
    throw ConfigError(fmt::format("it has no list '{}' of at most {}", member, most));
  return *found;
}

void put(json& object, const char* member, const std::optional<std::uint64_t>& value) {
  if (value) object[member] = *value;
}

json to_json(const std::vector<Member>& members) {
  json all = json::array();
  for (const Member& member : members)
    all.push_back({{"node", member.node},
                   {"seat", member.seat},
                   {"worker", member.incarnation},
                   {"pid", member.pid},
                   {"address", member.address}});
  return all;
}

std::string address_in(const json& object) {
  std::string address = text_in(object, "address");
  if (address.size() > kMaxAddressBytes) throw ConfigError("an address is too long");
  return address;
}

std::vector<Member> members_from(const json& object, const char* name) {
  std::vector<Member> members;
  std::set<std::pair<int, std::uint64_t>> seen;
  for (const json& one : list(object, name, kMostMembers)) {
    members.push_back({.node = small(one, "node", kMostNodes),
                       .seat = small(one, "seat", kMaxSeats - 1),
                       .incarnation = number(one, "worker", kMostIncarnations),
                       .pid = small(one, "pid", kMostPid),
                       .address = address_in(one)});
    if (members.size() > 1 && members.back().node < members[members.size() - 2].node)
      throw ConfigError(fmt::format("'{}' is not sorted by node", name));
    if (!seen.emplace(members.back().node, members.back().incarnation).second)
      throw ConfigError(fmt::format("'{}' has a worker twice", name));
  }
  return members;
}

json to_json(const JobGeneration& generation) {
  return {{"number", generation.number},
          {"members", to_json(generation.members)},
          {"leaving", to_json(generation.leaving)},
          {"over", generation.over},
          {"reason", generation.reason}};
}

GenerationPtr generation_from(const json& object) {
  const auto found = object.find("generation");
  if (found == object.end()) return nullptr;
  JobGeneration generation;
  generation.number = number(*found, "number", kMostGenerations);
  generation.members = members_from(*found, "members");
  generation.leaving = members_from(*found, "leaving");
  generation.over = number(*found, "over", kMostGenerations);
  generation.reason = text_in(*found, "reason");
  return std::make_shared<const JobGeneration>(std::move(generation));
}

WorkerReport worker_from(const json& object) {
  return {.seat = small(object, "seat", kMaxSeats - 1),
          .incarnation = number(object, "worker", kMostIncarnations),
          .pid = small(object, "pid", kMostPid),
          .state = WorkerState(number(object, "state", std::uint64_t(WorkerState::failed))),
          .cause = text_in(object, "cause"),
          .failed_for_good = flag(object, "for_good"),
          .comm_error = generation_number(object, "comm_error"),
          .message = text_in(object, "message"),
          .listed = generation_number(object, "listed"),
          .address = address_in(object)};
}

}  // namespace

json to_json(const NodeReport& report) {
  json workers = json::array();
  for (const WorkerReport& worker : report.workers) {
    workers.push_back({{"seat", worker.seat},
                       {"worker", worker.incarnation},
                       {"pid", worker.pid},
                       {"state", int(worker.state)},
                       {"cause", worker.cause},
                       {"for_good", worker.failed_for_good},
                       {"message", worker.message},
                       {"address", worker.address}});
    put(workers.back(), "comm_error", worker.comm_error);
    put(workers.back(), "listed", worker.listed);
  }
  json object{{"node", report.node}, {"rank", report.rank},
              {"host", report.host}, {"version", report.version},
              {"room", report.room}, {"started", report.started},
              {"workers", workers},  {"committed", report.committed}};
  if (report.generation) object["generation"] = to_json(*report.generation);
  put(object, "taken_up", report.taken_up);
  return object;
}

json to_json(const Assignment& assignment) {
  json object{{"term", assignment.term},
              {"acknowledged", assignment.acknowledged},
              {"over", assignment.over},
              {"start", assignment.start},
              {"kill", assignment.kill}};
  if (assignment.generation) object["generation"] = to_json(*assignment.generation);
  put(object, "taken_up", assignment.taken_up);
  if (assignment.end)
    object["end"] = {{"ok", assignment.end->ok}, {"reason", assignment.end->reason}};
  return object;
}

NodeReport node_report_from(const json& object) {
  NodeReport report;
  report.node = small(object, "node", kMostNodes);
  report.rank = object.value("rank", json()) == -1 ? -1 : small(object, "rank", kMostNodes);
  report.host = text_in(object, "host");
  report.version = whole_in(object, "version");
  report.room = small(object, "room", kMaxSeats);
  report.started = number(object, "started", kMostIncarnations);
  std::set<std::uint64_t> seen;
  for (const json& one : list(object, "workers", kMaxSeats)) {
    report.workers.push_back(worker_from(one));
    const std::uint64_t incarnation = report.workers.back().incarnation;
    if (incarnation >= report.started || !seen.insert(incarnation).second)
      throw ConfigError(fmt::format("worker {} was not started, or is there twice", incarnation));
  }
  report.generation = generation_from(object);
  report.committed = whole_in(object, "committed");
  report.taken_up = generation_number(object, "taken_up");
  return report;
}

Assignment assignment_from(const json& object) {
  Assignment assignment;
  assignment.term = whole_in(object, "term");
  assignment.acknowledged = whole_in(object, "acknowledged");
  assignment.generation = generation_from(object);
  assignment.over = number(object, "over", kMostGenerations);
  assignment.start = number(object, "start", kMostIncarnations);
  for (const json& one : list(object, "kill", kMaxSeats)) {
    if (!one.is_number_unsigned()) throw ConfigError("'kill' is no list of workers");
    assignment.kill.push_back(one.get<std::uint64_t>());
  }
  assignment.taken_up = generation_number(object, "taken_up");
  if (const auto end = object.find("end"); end != object.end())
    assignment.end = {.ok = flag(*end, "ok"), .reason = text_in(*end, "reason")};
  return assignment;
}

}  // namespace lockstep
