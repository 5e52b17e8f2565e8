#include "lockstep/collective/reduce.h"

#include <algorithm>
#include <cstring>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/collective/kernels.h"

namespace lockstep {
namespace {

constexpr std::size_t kCacheLineBytes = 64;
constexpr std::size_t kTileElements = 1024;  // a few levels fit in the first-level cache

bool is_16_bit_float(Dtype dtype) { return dtype == Dtype::float16 || dtype == Dtype::bfloat16; }

}  // namespace

Slice slice_of(ChunkRange chunks, int of, std::size_t count, Dtype dtype) {
  const std::size_t line = kCacheLineBytes / size_of(dtype);
  const std::size_t share = (count + of - 1) / of;
  const std::size_t chunk = (share + line - 1) / line * line;
  return {std::min(count, chunks.first * chunk), std::min(count, chunks.last * chunk)};
}

TreeLayout one_each(int size) {
  TreeLayout layout{.runs = {}, .virtual_ranks = size};
  for (int rank = 0; rank < size; ++rank) layout.runs.push_back({rank, rank + 1});
  return layout;
}

Tree::Tree(TreeLayout of) : layout(std::move(of)) {
  for (const VirtualRange run : layout.runs) {
    digest = mix({digest, static_cast<std::uint64_t>(run.lo), static_cast<std::uint64_t>(run.hi)});
    contributions.push_back(maximal_subtrees(run, layout.virtual_ranks).size());
  }
  plan = plan_combination(layout.runs, layout.virtual_ranks);
}

void Reducer::run(const ReduceJob& job, std::span<const std::byte* const> slots,
                  std::span<std::byte* const> results, std::size_t first, std::size_t last) {
  const bool widen = job.round_once && is_16_bit_float(job.dtype);
  const Dtype computed = widen ? Dtype::float32 : job.dtype;
  const std::size_t element_bytes = size_of(job.dtype);
  const std::size_t tile_bytes = kTileElements * size_of(computed);
  const Kernels& set = kernels();
  const BinaryKernel kernel = set.binary(computed, job.reduction);
  const CombineStep* const last_step = &job.plan.steps.back();
  scratch_.resize(job.plan.stack_depth * tile_bytes);
  stack_.resize(job.plan.stack_depth);

  for (std::size_t begin = first; begin < last; begin += kTileElements) {
    const std::size_t count = std::min(kTileElements, last - begin);
    const std::size_t offset = begin * element_bytes;
    std::byte* const out = results[0] + offset;
    std::size_t depth = 0;
    for (const CombineStep& step : job.plan.steps) {
      if (step.kind == CombineStep::Kind::push) {
        moved_ += count * element_bytes;
        const std::byte* slot = slots[step.rank] + step.slot * job.slot_bytes + offset;
        std::byte* level = scratch_.data() + depth * tile_bytes;
        if (widen) set.widen_to_float32(reinterpret_cast<float*>(level), slot, job.dtype, count);
        stack_[depth++] = widen ? level : slot;  // unwidened operands are read where they are
      } else {
        --depth;
        // The last sum goes home at once: every other operand has been read by then.
        std::byte* level =
            &step == last_step && !widen ? out : scratch_.data() + (depth - 1) * tile_bytes;
        kernel(level, stack_[depth - 1], stack_[depth], count);
        stack_[depth - 1] = level;
      }
    }
    LOCKSTEP_CHECK(depth == 1);
    const bool mean = job.reduction == Reduction::mean;
    const auto ranks = static_cast<std::int64_t>(slots.size());
    if (widen) {
      if (mean) set.divide(scratch_.data(), computed, ranks, count);
      set.round_from_float32(out, reinterpret_cast<const float*>(scratch_.data()), job.dtype,
                             count);
    } else {
      if (stack_[0] != out) std::memcpy(out, stack_[0], count * element_bytes);
      if (mean) set.divide(out, computed, ranks, count);
    }
    moved_ += results.size() * count * element_bytes;
    for (std::byte* const result : results.subspan(1))
      std::memcpy(result + offset, out, count * element_bytes);
  }
}

}  // namespace lockstep
