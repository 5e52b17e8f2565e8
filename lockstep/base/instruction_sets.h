// Which of the instruction sets that loops are compiled for this machine has. Pure; any thread.
#pragma once

#include <span>

namespace lockstep {

#if defined(__x86_64__)
inline bool has_avx2() { return __builtin_cpu_supports("avx2"); }
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool is_intel() { return __builtin_cpu_is("intel"); }
#else
inline bool has_avx512() { return false; }
inline bool is_intel() { return false; }
#endif

// Of variants of the same functions, the narrowest first, the last one that is usable.
template <typename Variant>
const Variant& widest(std::span<const Variant> variants) {
  const Variant* best = nullptr;
  for (const Variant& one : variants)
    if (one.usable) best = &one;
  return *best;
}

}  // namespace lockstep
