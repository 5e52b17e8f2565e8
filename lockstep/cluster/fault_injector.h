// The worker's side of --inject (faults.h): whoever makes steps says how far it is, and is struck
// where a fault says so. Nothing is read, and at() is one comparison, where LOCKSTEP_INJECT is not
// set. One thread.
#pragma once

#include <cstdint>
#include <vector>

#include "lockstep/cluster/faults.h"
#include "lockstep/cluster/world.h"

namespace lockstep {

class FaultInjector {
 public:
  // The faults of world.place().inject. Throws ConfigError.
  explicit FaultInjector(const World& world);
  bool empty() const { return faults_.empty(); }
  // At this point of step `step`, counted from 1. May not return, or throw: Error or std::bad_alloc
  // by the fault's wish, CommError where the group fails.
  void at(Point point, std::uint64_t step) {
    if (!faults_.empty()) [[unlikely]]
      strike(point, step);
  }

 private:
  void strike(Point point, std::uint64_t step);
  void execute(const Fault& fault);

  World world_;
  std::vector<Fault> faults_;
  std::vector<bool> claimed_;  // as far as this process knows
};

}  // namespace lockstep
