// Mixed precision: what is computed in a forward pass runs in bfloat16 where libtorch's autocast
// holds that safe (matrix products, convolutions, attention); weights, gradients and the optimizer
// stay in float32.
//
// Threads: the setting is the thread's, as libtorch's.
#pragma once

namespace lockstep {

enum class Precision { fp32, bf16 };

// Autocast to bfloat16 on the CPU for its lifetime, or, for fp32, nothing. Nests; what was set
// before comes back. The outermost empties the cache of converted weights: they change each step.
class [[nodiscard]] Autocast {
 public:
  explicit Autocast(Precision precision);
  ~Autocast();
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  const bool active_;
  bool was_enabled_ = false;
  int previous_type_ = 0;
};

}  // namespace lockstep
