// Reductions over shared memory whose result not every rank has: the additions are all_reduce's.
#include "lockstep/collective/shm_group.h"

namespace lockstep {

void ShmGroup::reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction, int root,
                      const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::reduce);
  check_root(root, size_, Operation::reduce);
  const ReduceJob job = job_of(dtype, reduction);
  const Call call{.operation = Operation::reduce,
                  .dtype = dtype,
                  .reduction = reduction,
                  .root = root,
                  .count = count,
                  .place = place_of(data, size_of(dtype))};
  run(call, options, data.size(), [&](const auto& calls) {
    if (data.empty()) return;
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return data.size(); }, results_)) {
      slots_.assign(results_.begin(), results_.end());
      execute(owner_writes_all_, job, slots_, {results_[root]}, count);
      return;
    }
    const auto slices = slices_of(data, dtype);
    StagedSlices staged{.inputs = {slices.begin(), slices.end()}};
    if (rank_ == root) {
      staged.result = slices[rank_].data();
      for (const auto slice : slices) staged.copies.push_back(slice.data());
    }
    reduce_staged(job, staged);
  });
}

void ShmGroup::reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output,
                              Dtype dtype, Reduction reduction, const CallOptions& options) {
  const std::uint64_t count = count_elements(output, dtype, Operation::reduce_scatter);
  check_parts(output, input, size_, -1, Operation::reduce_scatter);
  const ReduceJob job = job_of(dtype, reduction);
  const Call call{.operation = Operation::reduce_scatter,
                  .dtype = dtype,
                  .reduction = reduction,
                  .count = count,
                  .place = place_of(input, size_of(dtype))};
  run(call, options, input.size(), [&](const auto& calls) {
    if (output.empty()) return;
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return input.size(); }, slots_)) {
      for (const std::byte*& slot : slots_) slot += rank_ * output.size();
      results_.assign(1, output.data());
      reducer_.run(job, slots_, results_, 0, count);
      meeting_.meet();
      return;
    }
    StagedSlices staged{.result = output.data(), .anybody_copies = false};
    for (int owner = 0; owner < size_; ++owner)
      staged.inputs.push_back(input.subspan(owner * output.size(), output.size()));
    reduce_staged(job, staged);
  });
}

}  // namespace lockstep
