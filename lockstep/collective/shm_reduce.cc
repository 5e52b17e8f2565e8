// all_reduce and tree_all_reduce over shared memory: the owner of a slice reads every rank's slice
// once, in canonical order, and writes the result where it is needed.
#include "lockstep/collective/shm_group.h"

namespace lockstep {

void ShmGroup::execute(const Plan& plan, const ReduceJob& job, const Inputs& slots,
                       const Pointers& results, std::size_t count) {
  LOCKSTEP_CHECK(plan.canonical && plan.steps.front().kind == PlanStep::Kind::meet);
  for (const PlanStep& step : std::span(plan.steps).subspan(1)) {
    if (step.kind == PlanStep::Kind::meet) {
      meeting_.meet();
      continue;
    }
    const Slice slice = slice_of(step.combines, plan.chunks, count, job.dtype);
    reducer_.run(job, slots, results, slice.first, slice.last);
  }
}

// A few bytes travel in the announcement. Else the owner of a slice reduces it for all: in place in
// the arenas, in copies of small inputs, or chunk by chunk. Copies so small that reading them all
// costs less than a second meeting are read by all.
void ShmGroup::all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                          const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::all_reduce);
  const ReduceJob job = job_of(dtype, reduction);
  Call call{.operation = Operation::all_reduce, .dtype = dtype, .reduction = reduction};
  call.count = count;
  results_.assign(1, data.data());
  if (data.size() <= kPayloadBytes) {
    run(
        call, options, data.size(),
        [&](const auto& calls) {
          for (int rank = 0; rank < size_; ++rank)
            slots_[rank] = reinterpret_cast<const std::byte*>(&calls[rank][kPayloadWord]);
          reducer_.run(job, slots_, results_, 0, count);
        },
        data);
    return;
  }
  const std::uint64_t sequence = meeting_.next_sequence();
  const std::size_t all_bytes = data.size() * static_cast<std::size_t>(size_);
  const bool sleeps = !meeting_.may_spin();
  const bool is_flat = all_bytes <= (sleeps ? kFlatBytesAsleep : kFlatBytes);
  const bool leaves_arena = all_bytes <= (sleeps ? kFlatBytesAsleep : kFlatArenaBytes);
  call.place = leaves_arena ? kNowhere : place_of(data, size_of(dtype));
  if (call.place == kNowhere && data.size() <= kSharedInputBytes) {
    std::byte* const copy = meeting_.input_of(rank_, sequence);
    const Slice slice = own_slice(is_flat ? 0 : count, dtype);
    const std::size_t own = slice.first * size_of(dtype), behind = slice.last * size_of(dtype);
    std::memcpy(copy, data.data(), own);
    std::memcpy(copy + behind, data.data() + behind, data.size() - behind);
  }
  run(call, options, data.size(), [&](const auto& calls) {
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return data.size(); }, results_)) {
      slots_.assign(results_.begin(), results_.end());
      execute(owner_writes_all_, job, slots_, results_, count);
    } else if (data.size() <= kSharedInputBytes &&
               std::ranges::all_of(
                   calls, [](const auto& words) { return words[kPlaceWord] == kNowhere; })) {
      reduce_copies(job, data, sequence, is_flat);
    } else {
      const auto slices = slices_of(data, dtype);
      StagedSlices staged{.inputs = {slices.begin(), slices.end()}, .result = slices[rank_].data()};
      for (const auto slice : slices) staged.copies.push_back(slice.data());
      reduce_staged(job, staged);
    }
  });
}

void ShmGroup::reduce_copies(const ReduceJob& job, std::span<std::byte> data,
                             std::uint64_t sequence, bool is_flat) {
  const std::size_t count = data.size() / size_of(job.dtype);
  results_.assign(1, data.data());
  for (int rank = 0; rank < size_; ++rank) slots_[rank] = meeting_.input_of(rank, sequence);
  if (is_flat) return execute(flat_, job, slots_, results_, count);
  // Nobody has copied its own slice: where it would be, the others find the result.
  slots_[rank_] = data.data();
  results_.push_back(meeting_.input_of(rank_, sequence));
  execute(owner_writes_all_, job, slots_, results_, count);
  const auto slices = slices_of(data, job.dtype);
  for (int owner = 0; owner < size_; ++owner)
    if (owner != rank_ && !slices[owner].empty())
      std::memcpy(slices[owner].data(),
                  meeting_.input_of(owner, sequence) + (slices[owner].data() - data.data()),
                  slices[owner].size());
}

void ShmGroup::tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                               const TreeLayout& layout, const CallOptions& options) {
  const std::uint64_t count = count_elements(result, dtype, Operation::tree_all_reduce);
  if (!tree_ || tree_->layout != layout) {
    check_layout(layout, size_);
    tree_ = std::make_unique<Tree>(layout);
  }
  const Tree& tree = *tree_;
  check_tree(slots, result, dtype, tree.contributions[rank_]);
  const auto used = slots.first(tree.contributions[rank_] * result.size());
  const Call call{.operation = Operation::tree_all_reduce,
                  .dtype = dtype,
                  .virtual_ranks = layout.virtual_ranks,
                  .count = count,
                  .layout = tree.digest,
                  .place = place_of(used, size_of(dtype)),
                  .result_place = place_of(result, size_of(dtype))};
  if ((!used.empty() && call.place == kNowhere) ||
      (!result.empty() && call.result_place == kNowhere))
    throw ConfigError("tree_all_reduce: slots and result must come from the group's allocate()");
  const ReduceJob job{.plan = tree.plan,
                      .dtype = dtype,
                      .reduction = Reduction::sum,
                      .round_once = false,
                      .slot_bytes = result.size()};
  run(call, options, result.size(), [&](const auto& calls) {
    if (result.empty()) return;
    const auto slot_bytes = [&](int rank) { return tree.contributions[rank] * result.size(); };
    if (!locate(calls, kPlaceWord, size_of(dtype), slot_bytes, slots_) ||
        !locate(
            calls, kResultPlaceWord, size_of(dtype), [&](int) { return result.size(); }, results_))
      throw Error("a rank announced memory outside its arena");
    execute(owner_writes_all_, job, slots_, results_, count);
  });
}

}  // namespace lockstep
