// The gradient that all nodes' contributions to a step add up to, as it lies in the memory of each
// of them: carriers, the ranks that a node has in the exchange with others, write a part each. Once
// every carrier has said that its part is there, it is the node's one contribution to the step.
//
// Who owns what: the memory is the caller's, zeroed at first, 64-byte aligned, and outlives this
// view of it. Threads: any process that maps the memory; a part belongs to its carrier. Words are
// input.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "lockstep/base/error.h"
#include "lockstep/update/shared_state.h"

namespace lockstep {

class ReducedGradient {
 public:
  static std::size_t bytes(std::uint64_t elements) { return kWordBytes + elements * sizeof(float); }
  ReducedGradient(std::span<std::byte> memory, std::uint64_t elements) : memory_(memory) {
    if (memory.size() != bytes(elements))
      throw Error(
          "the memory of the nodes' gradient has another size: every worker needs the same "
          "module");
  }
  std::span<float> values() const {
    return {reinterpret_cast<float*>(memory_.data() + kWordBytes),
            (memory_.size() - kWordBytes) / sizeof(float)};
  }
  // This carrier's part, one of `carriers`, is that of `step`.
  void complete(std::size_t carrier, std::size_t carriers, std::uint64_t step) const {
    LOCKSTEP_CHECK(carrier < carriers && carriers <= kMaxSlices && step <= kMaxStep);
    word(carrier).store(step << 16 | carriers, std::memory_order_release);
  }
  // The step that every part is of; 0: none.
  std::uint64_t step() const {
    const std::uint64_t first = word(0).load(std::memory_order_acquire);
    const std::uint64_t carriers = first & 0xffff;
    if (carriers == 0 || carriers > kMaxSlices) return 0;
    for (std::uint64_t carrier = 1; carrier < carriers; ++carrier)
      if (word(carrier).load(std::memory_order_acquire) != first) return 0;
    return first >> 16;
  }

 private:
  static constexpr std::size_t kWordBytes = kMaxSlices * sizeof(std::uint64_t);
  std::atomic_ref<std::uint64_t> word(std::size_t carrier) const {
    return std::atomic_ref(reinterpret_cast<std::uint64_t*>(memory_.data())[carrier]);
  }
  std::span<std::byte> memory_;
};

}  // namespace lockstep
