// A worker's stream of events, whole and in pieces: the cuts must not change what is read.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "fuzz/target.h"
#include "lockstep/base/error.h"
#include "lockstep/observe/event.h"

namespace {

using lockstep::EventReader;

struct Outcome {
  std::vector<nlohmann::json> events;
  bool failed = false;
  bool operator==(const Outcome&) const = default;
};

// Reads in pieces of `step` bytes. Events of a feed() that fails at a later frame are lost with it.
Outcome read(std::span<const std::byte> bytes, std::size_t step) {
  Outcome outcome;
  EventReader reader;
  try {
    while (!bytes.empty()) {
      const std::size_t count = std::min(step, bytes.size());
      for (auto& event : reader.feed(bytes.first(count))) {
        LOCKSTEP_CHECK(event.is_object() && event.at("event").is_string());
        outcome.events.push_back(std::move(event));
      }
      bytes = bytes.subspan(count);
    }
  } catch (const lockstep::Error&) {
    outcome.failed = true;
  }
  return outcome;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  const Outcome whole = read(bytes, size + 1);
  const Outcome pieces = read(bytes, 3);
  LOCKSTEP_CHECK(whole.failed == pieces.failed);
  LOCKSTEP_CHECK(whole.failed || whole == pieces);
  return 0;
}
