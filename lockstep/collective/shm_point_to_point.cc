// Messages between two ranks over shared memory: the receiver reads from the sender's arena, or
// from the two halves of its staging buffer in turn, one of which is filled meanwhile.
#include "lockstep/collective/shm_group.h"

namespace lockstep {
namespace {

constexpr std::size_t kHalf = kStagingBytes / 2;

std::uint64_t chunks_of(std::size_t bytes) {
  return std::max<std::uint64_t>(1, (bytes + kHalf - 1) / kHalf);
}

}  // namespace

template <typename Body>
void ShmGroup::run_message(int peer, const Call& call, const CallOptions& options,
                           std::uint64_t bytes, Body&& body) {
  const CallWords sent = meeting_.begin_message(peer, call, options);
  try {
    body(sent[kPlaceWord]);
  } catch (const CommError&) {
    throw;
  } catch (const std::exception& error) {
    meeting_.fail(error.what());
  }
  meeting_.end_message(bytes);
}

void ShmGroup::send(std::span<const std::byte> data, Dtype dtype, int destination,
                    const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::send);
  check_peer(destination, rank_, size_, Operation::send);
  const auto stage_chunk = [&](std::uint64_t chunk) {
    const auto part = data.subspan(chunk * kHalf, std::min(kHalf, data.size() - chunk * kHalf));
    if (!part.empty()) std::memcpy(staging_.data() + chunk % 2 * kHalf, part.data(), part.size());
  };
  const Call call{.operation = Operation::send,
                  .dtype = dtype,
                  .root = destination,
                  .count = count,
                  .place = place_of(data, 1)};
  const bool stages = call.place == kNowhere;
  const std::uint64_t chunks = stages ? chunks_of(data.size()) : 1;
  if (stages) stage_chunk(0);
  run_message(destination, call, options, data.size(), [&](std::uint64_t) {
    for (std::uint64_t chunk = 1; chunk < chunks; ++chunk) {
      if (chunk >= 2) meeting_.await_taken(destination, chunk - 1);
      stage_chunk(chunk);
      meeting_.set_staged(chunk + 1);
    }
    meeting_.await_taken(destination, chunks);
  });
}

void ShmGroup::recv(std::span<std::byte> data, Dtype dtype, int source,
                    const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::recv);
  check_peer(source, rank_, size_, Operation::recv);
  const Call call{.operation = Operation::recv, .dtype = dtype, .root = source, .count = count};
  run_message(source, call, options, data.size(), [&](std::uint64_t place) {
    if (place != kNowhere) {
      const std::byte* from = at(source, place, data.size(), 1);
      if (!data.empty()) std::memcpy(data.data(), from, data.size());
      return meeting_.set_taken(source, 1);
    }
    for (std::uint64_t chunk = 0; chunk < chunks_of(data.size()); ++chunk) {
      meeting_.await_staged(source, chunk + 1);
      const auto part = data.subspan(chunk * kHalf, std::min(kHalf, data.size() - chunk * kHalf));
      if (!part.empty())
        std::memcpy(part.data(), stagings_[source] + chunk % 2 * kHalf, part.size());
      meeting_.set_taken(source, chunk + 1);
    }
  });
}

}  // namespace lockstep
