// For tests alone: a set of shared weights in memory of the test's own, contributions that depend
// on the weights, and the same work done by the plain twin.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/update/naive_test.h"
#include "lockstep/update/recovery.h"

namespace lockstep {

struct UpdateCase {
  UpdateSpec spec;
  int virtual_ranks = 4;
  double max_norm = 0;
  std::uint64_t seed = 1;

  // The options of a step: a schedule.
  std::vector<OptimizerOptions> options(std::uint64_t step) const {
    std::vector<OptimizerOptions> groups = spec.groups;
    for (OptimizerOptions& group : groups) group.lr /= static_cast<double>(step);
    return groups;
  }
  // Some virtual ranks have no samples in some steps.
  VirtualLoss loss(std::uint64_t step, int virtual_rank) const {
    const std::uint64_t random = mix({seed, step, static_cast<std::uint64_t>(virtual_rank)});
    const bool none = virtual_rank > 0 && random % 5 == 0;
    return none ? VirtualLoss{} : VirtualLoss{1.0 / static_cast<double>(step), 3.0};
  }
  // What a virtual rank computes from the weights as they are: wrong weights make wrong gradients.
  void contribute(std::uint64_t step, int virtual_rank, std::span<const float> weights,
                  std::span<float> out) const {
    const bool none = loss(step, virtual_rank).weight == 0;
    std::uint64_t random = mix({seed, step, static_cast<std::uint64_t>(virtual_rank), 9});
    for (std::size_t i = 0; i < out.size(); ++i) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      const auto noise = static_cast<float>(static_cast<std::int32_t>(random >> 32)) * 0x1p-31f;
      out[i] = none ? 0.0f : noise + 0.1f * weights[i];
    }
  }
  float first_weight(std::size_t i) const {
    return static_cast<float>(mix({seed, i}) % 2001) / 1000 - 1;
  }
  StepRecord plan(const StepRecord& last, const std::vector<VirtualRange>& runs, int slices) const {
    std::vector<VirtualLoss> losses;
    for (int v = 0; v < virtual_ranks; ++v) losses.push_back(loss(last.step + 1, v));
    const auto groups = options(last.step + 1);
    return plan_step(spec, last,
                     {.groups = groups, .runs = runs, .losses = losses, .slices = slices});
  }
  void initialise(std::span<float> weights) const {
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = first_weight(i);
  }

  naive::Weights twin_after(std::uint64_t steps) const {
    naive::Weights twin(spec);
    initialise(twin.weights);
    for (std::uint64_t step = 1; step <= steps; ++step) {
      std::vector<std::vector<float>> contributions;
      double weight = 0;
      int had_samples = 0;
      for (int v = 0; v < virtual_ranks; ++v) {
        contribute(step, v, twin.weights, contributions.emplace_back(spec.elements));
        weight += loss(step, v).weight;
        had_samples += loss(step, v).weight > 0 ? 1 : 0;
      }
      twin.step(contributions, weight, had_samples, options(step), max_norm);
    }
    return twin;
  }
};

// Memory that forked processes share: a memfd, as a job's segment is.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes) : bytes_(bytes) {
    const int fd = ::memfd_create("lockstep-test", MFD_CLOEXEC);
    LOCKSTEP_CHECK(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(bytes)) == 0);
    base_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    LOCKSTEP_CHECK(base_ != MAP_FAILED);
    ::close(fd);
  }
  ~SharedMemory() { ::munmap(base_, bytes_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  std::span<std::byte> span() const { return {static_cast<std::byte*>(base_), bytes_}; }

 private:
  std::size_t bytes_;
  void* base_;
};

// The shared weights of a case and its ranks' slots, in one memory.
class CaseMemory {
 public:
  CaseMemory(const UpdateCase& what, int ranks)
      : layout_(SharedLayout::of(what.spec, ranks)),
        stride_(layout_.tiles() * kTileElements),
        slots_(static_cast<std::size_t>(what.virtual_ranks)),
        memory_(layout_.total_bytes() +
                static_cast<std::size_t>(ranks) * slots_ * stride_ * sizeof(float)) {
    const auto state = SharedState::create(memory_.span().first(layout_.total_bytes()), what.spec,
                                           layout_, first_record(what.spec));
    what.initialise(state.weights());
    auto* const slots = reinterpret_cast<float*>(memory_.span().data() + layout_.total_bytes());
    for (std::size_t rank = 0; rank < static_cast<std::size_t>(ranks); ++rank)
      ranks_.emplace_back(slots + rank * slots_ * stride_, slots_ * stride_);
    for (const std::span<float> rank : ranks_) views_.emplace_back(rank);
  }
  SharedState state() const {
    return SharedState::attach(memory_.span().first(layout_.total_bytes()), layout_);
  }
  Contributions contributions() const { return {.ranks = views_, .stride = stride_}; }
  // What rank computes of `step`: its run, merged as plan_accumulation says. Calls `instant` in the
  // middle of things.
  void contribute(
      const UpdateCase& what, std::uint64_t step, int rank, VirtualRange run,
      const std::function<void()>& instant = [] {}) const {
    const SharedState shared = state();
    const std::span<float> slots = ranks_[static_cast<std::size_t>(rank)];
    const auto slot = [&](std::size_t i) { return slots.subspan(i * stride_, what.spec.elements); };
    for (const AccumulateStep& next : plan_accumulation(run, what.virtual_ranks).steps) {
      auto top = static_cast<std::size_t>(next.slot);
      what.contribute(step, next.virtual_rank, shared.weights(), slot(top));
      instant();
      for (int merge = 0; merge < next.merges; ++merge, --top)
        for (std::size_t i = 0; i < what.spec.elements; ++i) {
          slot(top - 1)[i] += slot(top)[i];
          if (i == what.spec.elements / 2) instant();
        }
    }
  }

 private:
  SharedLayout layout_;
  std::size_t stride_;
  std::size_t slots_;  // of a rank
  SharedMemory memory_;
  std::vector<std::span<float>> ranks_;
  std::vector<std::span<const float>> views_;
};

// Bit for bit. NaN is equal to itself, 0 is not -0.
inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}
inline bool same_bits(const SharedState& state, const naive::Weights& twin) {
  bool same = same_bits(state.weights(), twin.weights);
  for (std::size_t i = 0; i < twin.states.size(); ++i)
    same = same && same_bits(state.state(static_cast<int>(i)), twin.states[i]);
  return same;
}

}  // namespace lockstep
