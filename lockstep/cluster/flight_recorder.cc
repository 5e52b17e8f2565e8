#include "lockstep/cluster/flight_recorder.h"

#include <fmt/format.h>

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

struct Recorded {
  int seat = 0;
  std::optional<int> rank;
};

// The members' seats by rank, then those of others that have left records. Without generations a
// seat is a rank.
std::vector<Recorded> recorded_seats(Segment& segment) {
  std::optional<Generation> generation;
  try {
    generation = newest_generation(segment);
  } catch (const Error&) {  // damaged; the records may be whole
  }
  std::vector<Recorded> seats;
  std::vector<bool> taken(static_cast<std::size_t>(segment.seats()), !generation);
  for (int rank = 0; rank < (generation ? int(generation->seats.size()) : segment.seats());
       ++rank) {
    seats.push_back({generation ? generation->seats[std::size_t(rank)] : rank, rank});
    taken[std::size_t(seats.back().seat)] = true;
  }
  for (int seat = 0; seat < segment.seats(); ++seat)
    if (!taken[std::size_t(seat)] && segment.recorder(seat).opened.load() != 0)
      seats.push_back({seat, std::nullopt});
  return seats;
}

}  // namespace

bool has_flight_record(Segment& segment) {
  for (int rank = 0; rank < segment.seats(); ++rank)
    if (segment.recorder(rank).opened.load() != 0) return true;
  return false;
}

nlohmann::json flight_record(Segment& segment) {
  nlohmann::json ranks = nlohmann::json::array();
  for (const auto& [seat, rank] : recorded_seats(segment)) {
    nlohmann::json operations = nlohmann::json::array();
    for (const RecordedOperation& operation : recorded_operations(segment, seat))
      operations.push_back(json_of(operation));
    const ControlBlock& block = segment.control(seat);
    ranks.push_back({{"rank", rank ? nlohmann::json(*rank) : nlohmann::json()},
                     {"seat", seat},
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
  for (const auto& [seat, rank] : recorded_seats(segment)) {
    const ControlBlock& block = segment.control(seat);
    text += fmt::format("{}{} (pid {}, {}): {}", text.empty() ? "" : "\n",
                        rank ? fmt::format("rank {}", *rank) : "no rank any more", block.pid.load(),
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
