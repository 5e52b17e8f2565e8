// all_reduce and tree_all_reduce over shared memory: the owner of a slice reads every rank's slice
// once, in canonical order, and writes the result where it is needed.
#include "lockstep/base/hash.h"
#include "lockstep/collective/shm_group.h"

namespace lockstep {

Tree::Tree(TreeLayout of) : layout(std::move(of)) {
  for (const VirtualRange run : layout.runs) {
    digest = mix({digest, static_cast<std::uint64_t>(run.lo), static_cast<std::uint64_t>(run.hi)});
    contributions.push_back(maximal_subtrees(run, layout.virtual_ranks).size());
  }
  plan = plan_combination(layout.runs, layout.virtual_ranks);
}

void ShmGroup::reduce_slice(const ReduceJob& job, const Pointers& slots, const Pointers& results,
                            std::size_t count) {
  // Whole cache lines, so that no two ranks write to the same one.
  const std::size_t line = kCacheLine / size_of(job.dtype);
  const std::size_t share = (count + size_ - 1) / size_;
  const std::size_t slice = (share + line - 1) / line * line;
  const std::size_t first = std::min(count, rank_ * slice);
  reducer_.run(job, slots, results, first, std::min(count, first + slice));
}

void ShmGroup::all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                          const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::all_reduce);
  const std::uint64_t place = place_of(data, size_of(dtype));
  if (place == kNowhere) stage(data);
  const ReduceJob job{.plan = own_tree_.plan,
                      .dtype = dtype,
                      .reduction = reduction,
                      .round_once = true,
                      .slot_bytes = 0};
  const Call call{.operation = Operation::all_reduce,
                  .dtype = dtype,
                  .reduction = reduction,
                  .count = count,
                  .place = place};
  run(call, options, data.size(), [&](const auto& calls) {
    if (data.empty()) return;
    if (locate(
            calls, kPlaceWord, size_of(dtype), [&](int) { return data.size(); }, slots_)) {
      reduce_slice(job, slots_, slots_, count);
      meeting_.meet();
      return;
    }
    const bool staged = std::all_of(calls.begin(), calls.end(), [](const CallWords& words) {
      return words[kPlaceWord] == kNowhere;
    });
    in_chunks(data, true, staged, [&](std::size_t offset, std::size_t bytes) {
      reduce_slice(job, stagings_, stagings_, bytes / size_of(dtype));
      meeting_.meet();
      std::memcpy(data.data() + offset, staging_.data(), bytes);
    });
  });
}

void ShmGroup::tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                               const TreeLayout& layout, const CallOptions& options) {
  const std::uint64_t count = count_elements(result, dtype, Operation::tree_all_reduce);
  if (!tree_ || tree_->layout.runs != layout.runs ||
      tree_->layout.virtual_ranks != layout.virtual_ranks) {
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
    reduce_slice(job, slots_, results_, count);
    meeting_.meet();
  });
}

}  // namespace lockstep
