// Reductions over shared memory whose result not every rank has: the additions are all_reduce's.
#include "lockstep/collective/shm_group.h"

namespace lockstep {

void ShmGroup::reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction, int root,
                      const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::reduce);
  check_root(root, size_, Operation::reduce);
  const ReduceJob job{.plan = own_tree_.plan,
                      .dtype = dtype,
                      .reduction = reduction,
                      .round_once = true,
                      .slot_bytes = 0};
  const Call call{.operation = Operation::reduce,
                  .dtype = dtype,
                  .reduction = reduction,
                  .root = root,
                  .count = count,
                  .place = place_of(data, size_of(dtype))};
  run(call, options, data.size(), [&](const auto& calls) {
    if (data.empty()) return;
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return data.size(); }, slots_)) {
      reduce_slice(job, slots_, {slots_[root]}, count);
      meeting_.meet();
      return;
    }
    in_chunks(data, true, false, [&](std::size_t offset, std::size_t bytes) {
      reduce_slice(job, stagings_, {stagings_[root]}, bytes / size_of(dtype));
      meeting_.meet();
      if (rank_ == root) std::memcpy(data.data() + offset, staging_.data(), bytes);
    });
  });
}

void ShmGroup::reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output,
                              Dtype dtype, Reduction reduction, const CallOptions& options) {
  const std::uint64_t count = count_elements(output, dtype, Operation::reduce_scatter);
  check_parts(output, input, size_, -1, Operation::reduce_scatter);
  const ReduceJob job{.plan = own_tree_.plan,
                      .dtype = dtype,
                      .reduction = reduction,
                      .round_once = true,
                      .slot_bytes = 0};
  const Call call{.operation = Operation::reduce_scatter,
                  .dtype = dtype,
                  .reduction = reduction,
                  .count = count,
                  .place = place_of(input, size_of(dtype))};
  run(call, options, input.size(), [&](const auto& calls) {
    if (output.empty()) return;
    // Elements [0, n) of `output`, which the ranks' memory has from `skip` bytes on.
    const auto reduce_part = [&](std::size_t skip, std::size_t n, std::byte* to) {
      for (std::byte*& slot : slots_) slot += skip;
      results_.assign(1, to);
      reducer_.run(job, slots_, results_, 0, n);
      meeting_.meet();
    };
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return input.size(); }, slots_))
      return reduce_part(rank_ * output.size(), count, output.data());
    // A chunk holds the same elements of every rank's part.
    const std::size_t room = kStagingBytes / size_ / kCacheLine * kCacheLine;
    for (std::size_t offset = 0; offset < output.size(); offset += room) {
      const std::size_t bytes = std::min(room, output.size() - offset);
      for (int part = 0; part < size_; ++part)
        std::memcpy(staging_.data() + part * room, input.data() + part * output.size() + offset,
                    bytes);
      meeting_.meet();
      slots_ = stagings_;
      reduce_part(rank_ * room, bytes / size_of(dtype), output.data() + offset);
    }
  });
}

}  // namespace lockstep
