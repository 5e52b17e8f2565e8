// A segment whose bytes a hostile holder wrote: header, control blocks and flight recorders. What
// is read from it may be nonsense, but never a fault.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>

#include "fuzz/target.h"
#include "lockstep/cluster/flight_recorder.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/operation_record.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/segment.h"

namespace {

using lockstep::Segment;

constexpr int kRanks = 2;

// The input's bytes over those at `at`, again and again until `bytes` are full.
void fill(void* at, std::size_t bytes, std::span<const std::uint8_t> input) {
  auto* to = static_cast<std::uint8_t*>(at);
  for (std::size_t i = 0; i < bytes && !input.empty(); ++i) to[i] = input[i % input.size()];
}

template <typename Action>
void may_refuse(Action action) {
  try {
    action();
  } catch (const lockstep::Error&) {
  }
}

void look_at_everything(const std::shared_ptr<Segment>& segment) {
  segment->abort_reason();
  for (int rank = 0; rank < segment->seats(); ++rank) {
    for (const auto& operation : lockstep::recorded_operations(*segment, rank)) {
      LOCKSTEP_CHECK(operation.call.tag.view().size() <= 32 && operation.group.size() <= 16);
      operation.bytes();
    }
    may_refuse([&] { segment->release(rank, segment->allocate(rank, 100, "memory")); });
  }
  lockstep::last_operations(*segment);
  LOCKSTEP_CHECK(!lockstep::flight_record(*segment)
                      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
                      .empty());
  // A group in it: joins, waits for a rank that is nonsense, and says so.
  may_refuse([&] {
    lockstep::make_shm_group(segment, 0, {.timeout = std::chrono::milliseconds(1)})->barrier();
  });
}

// The first bytes of the input are the header.
void attach(const Segment& genuine, std::span<const std::uint8_t> input) {
  const int fd = ::memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  LOCKSTEP_CHECK(fd >= 0);
  lockstep::UniqueFd copy(fd);
  std::uint8_t header[64];
  LOCKSTEP_CHECK(::pread(genuine.fd(), header, sizeof header, 0) == sizeof header);
  std::copy_n(input.begin(), std::min(input.size(), sizeof header), header);
  LOCKSTEP_CHECK(::ftruncate(fd, ::lseek(genuine.fd(), 0, SEEK_END)) == 0);
  LOCKSTEP_CHECK(::pwrite(fd, header, sizeof header, 0) == sizeof header);
  ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  may_refuse([&] { look_at_everything(Segment::attach(std::move(copy))); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto make = [] { return Segment::create({.seats = kRanks, .arena_bytes = 8 << 20}); };
  static const std::shared_ptr<Segment> genuine = make();
  const std::span input(data, size);
  attach(*genuine, input);
  const auto segment = make();
  for (int rank = 0; rank < kRanks; ++rank) {
    fill(&segment->control(rank), sizeof(lockstep::ControlBlock), input);
    fill(&segment->recorder(rank), sizeof(lockstep::FlightRecorder), input);
    // What is in memory must not send signals or end this process: nobody's pid.
    if (segment->control(rank).pid.load() > 0) segment->control(rank).pid.store(1 << 30);
  }
  look_at_everything(segment);
  return 0;
}
