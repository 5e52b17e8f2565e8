#include "lockstep/cluster/flight_recorder.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/collective/operation_record.h"
#include "lockstep/collective/process_state.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/generation_board.h"

namespace lockstep {
namespace {

std::string_view process_text(const ControlBlock& block) {
  return name_of(process_state(block.pid.load(), block.process_start.load()));
}

nlohmann::json json_of(const RecordedOperation& operation) {
  const bool open = operation.state == OperationState::open;
  return {{"serial", operation.serial},
          {"operation", operation.name()},
          {"call", describe(operation.call)},
          {"group", operation.group},
          {"generation", operation.call.generation},
          {"sequence", operation.call.sequence},
          {"count", operation.call.count},
          {"bytes", operation.bytes()},
          {"tag", std::string(operation.call.tag.view())},
          {"state", name_of(operation.state)},
          {"start_ns", operation.started_at_ns},
          {"end_ns", open ? nlohmann::json() : nlohmann::json(operation.ended_at_ns)},
          {"waited_ns", open ? nlohmann::json() : nlohmann::json(operation.waited.count())}};
}

std::string last_operation(Segment& segment, int rank, std::int64_t now_ns) {
  const auto operations = recorded_operations(segment, rank);
  if (operations.empty()) return "no operation yet";
  const RecordedOperation& last = operations.back();
  const bool open = last.state == OperationState::open;
  const std::int64_t since = open ? last.started_at_ns : last.ended_at_ns;
  const double age_s = (static_cast<double>(now_ns) - static_cast<double>(since)) * 1e-9;
  const bool failed = last.state == OperationState::failed;
  return fmt::format("{} {}, {}{:.2f} s{}",
                     open     ? "in"
                     : failed ? "failed in"
                              : "after",
                     describe(last), open ? "for " : "", age_s, open ? "" : " ago");
}

// Who sat where: the newest generation's ranks in order, then those that died before, rank -1.
struct Occupant {
  int seat, rank;
};
std::vector<Occupant> occupants(Segment& segment) {
  std::optional<Generation> generation;
  try {
    generation = newest_generation(segment);
  } catch (const Error&) {  // damaged: by seat
  }
  std::vector<Occupant> all;
  for (const int seat : generation ? generation->seats : std::vector<int>())
    all.push_back({seat, static_cast<int>(all.size())});
  for (int seat = 0; seat < segment.seats(); ++seat)
    if (!generation)
      all.push_back({seat, seat});
    else if (segment.control(seat).pid.load() != 0 &&
             std::ranges::find(generation->seats, seat) == generation->seats.end())
      all.push_back({seat, -1});
  return all;
}

}  // namespace

bool has_flight_record(Segment& segment) {
  for (int rank = 0; rank < segment.seats(); ++rank)
    if (segment.recorder(rank).opened.load() != 0) return true;
  return false;
}

nlohmann::json flight_record(Segment& segment) {
  nlohmann::json ranks = nlohmann::json::array();
  for (const auto& [seat, rank] : occupants(segment)) {
    nlohmann::json operations = nlohmann::json::array();
    for (const RecordedOperation& operation : recorded_operations(segment, seat))
      operations.push_back(json_of(operation));
    const ControlBlock& block = segment.control(seat);
    ranks.push_back({{"rank", rank},
                     {"pid", block.pid.load()},
                     {"process", process_text(block)},
                     {"operations_begun", segment.recorder(seat).opened.load()},
                     {"operations", std::move(operations)}});
  }
  return {{"now_ns", nanoseconds_of(Clock::now())}, {"ranks", std::move(ranks)}};
}

std::string last_operations(Segment& segment) {
  const std::int64_t now_ns = nanoseconds_of(Clock::now());
  std::string text;
  for (const auto& [seat, rank] : occupants(segment)) {
    const ControlBlock& block = segment.control(seat);
    text += fmt::format("{}{} (pid {}, {}): {}", text.empty() ? "" : "\n",
                        rank < 0 ? "replaced" : fmt::format("rank {}", rank), block.pid.load(),
                        process_text(block), last_operation(segment, seat, now_ns));
  }
  return text;
}

std::string dump_flight_record(Segment& segment, const std::filesystem::path& file) {
  if (!has_flight_record(segment)) return "";
  std::string end;
  try {
    write_file_atomically(
        file, flight_record(segment).dump(1, ' ', false, nlohmann::json::error_handler_t::replace) +
                  "\n");
    end =
        fmt::format("the last {} operations of every rank: {}", kRecordedOperations, file.string());
  } catch (const Error& error) {
    end = fmt::format("the operations before these are lost: {}", error.what());
  }
  return fmt::format("the last operation of every rank:\n{}\n{}", last_operations(segment), end);
}

}  // namespace lockstep
