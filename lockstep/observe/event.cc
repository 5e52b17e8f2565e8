#include "lockstep/observe/event.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr std::size_t kHeaderBytes = 4;

nlohmann::json parse_event(std::span<const std::byte> bytes) {
  const char* text = reinterpret_cast<const char*>(bytes.data());
  nlohmann::json event =
      nlohmann::json::parse(text, text + bytes.size(), nullptr, /*allow_exceptions=*/false);
  if (event.is_discarded()) throw Error("not JSON");
  const auto kind = event.is_object() ? event.find("event") : event.end();
  if (kind == event.end() || !kind->is_string())
    throw Error("not an object with a string \"event\"");
  return event;
}

}  // namespace

void PipeEventSink::emit(const nlohmann::json& event) {
  // A worker's text may hold any bytes (a file's name, a CSV's header): never a reason to fail.
  const std::string text = event.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() > kMaxEventBytes)
    throw Error(fmt::format("an event of {} bytes is larger than the {} allowed", text.size(),
                            kMaxEventBytes));
  std::vector<std::byte> frame(kHeaderBytes + text.size());
  write_little_endian(static_cast<std::uint32_t>(text.size()), frame.data());
  std::memcpy(frame.data() + kHeaderBytes, text.data(), text.size());
  if (const int error = write_all(fd_.get(), frame))
    throw Error("cannot send an event to the agent: " + errno_text(error));
}

EventReader::EventReader() = default;
EventReader::~EventReader() = default;

std::vector<nlohmann::json> EventReader::feed(std::span<const std::byte> bytes) {
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  std::vector<nlohmann::json> events;
  std::size_t used = 0;
  while (const auto length = read_little_endian<std::uint32_t>(buffer_, used)) {
    if (*length > kMaxEventBytes)
      throw Error(
          fmt::format("a frame of {} bytes, at most {} are allowed", *length, kMaxEventBytes));
    if (!in_bounds(used + kHeaderBytes, *length, buffer_.size())) break;
    events.push_back(parse_event(std::span(buffer_).subspan(used + kHeaderBytes, *length)));
    used += kHeaderBytes + *length;
  }
  buffer_.erase(buffer_.begin(), buffer_.begin() + static_cast<std::ptrdiff_t>(used));
  return events;
}

bool EventReader::in_the_middle() const { return !buffer_.empty(); }

}  // namespace lockstep
