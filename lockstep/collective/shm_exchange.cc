// What only copies over shared memory: every rank reads from the others what it is to have.
#include "lockstep/collective/shm_group.h"

namespace lockstep {

void ShmGroup::broadcast(std::span<std::byte> data, Dtype dtype, int root,
                         const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::broadcast);
  check_root(root, size_);
  const bool is_root = rank_ == root;
  const std::uint64_t place = place_of(data, size_of(dtype));
  if (is_root && place == kNowhere) stage(data);
  const Call call{.operation = Operation::broadcast,
                  .dtype = dtype,
                  .root = root,
                  .count = count,
                  .place = place};
  run(call, options, data.size(), [&](const auto& calls) {
    const std::uint64_t source = calls[root][kPlaceWord];
    if (source != kNowhere && !data.empty()) {
      const auto from = segment_->at(root, source, data.size());
      if (!is_root) std::memcpy(data.data(), from.data(), data.size());
      meeting_.meet();
      return;
    }
    in_chunks(data, is_root, true, [&](std::size_t offset, std::size_t bytes) {
      if (!is_root) std::memcpy(data.data() + offset, stagings_[root], bytes);
      meeting_.meet();
    });
  });
}

void ShmGroup::all_gather(std::span<const std::byte> input, std::span<std::byte> output,
                          Dtype dtype, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::all_gather);
  check_gather(input, output, rank_, size_);
  const std::uint64_t place = place_of(input, size_of(dtype));
  if (place == kNowhere) stage(input);
  const Call call{
      .operation = Operation::all_gather, .dtype = dtype, .count = count, .place = place};
  run(call, options, input.size(), [&](const auto& calls) {
    const auto copy_out = [&](const Pointers& from, std::size_t offset, std::size_t bytes) {
      for (int i = 0; i < size_; ++i) {
        const int other = (rank_ + i) % size_;  // not all ranks read from the same one at once
        std::byte* to = output.data() + other * input.size() + offset;
        if (other != rank_)
          std::memcpy(to, from[other], bytes);
        else if (to != input.data() + offset)
          std::memcpy(to, input.data() + offset, bytes);
      }
      meeting_.meet();
    };
    if (input.empty()) return;
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return input.size(); }, slots_))
      return copy_out(slots_, 0, input.size());
    const bool staged = std::all_of(calls.begin(), calls.end(), [](const CallWords& words) {
      return words[kPlaceWord] == kNowhere;
    });
    in_chunks(input, true, staged,
              [&](std::size_t offset, std::size_t bytes) { copy_out(stagings_, offset, bytes); });
  });
}

}  // namespace lockstep
