// Snapshots of the model for the agent, which writes the files: two areas in this rank's arena,
// written in turn. A sequence word tells the agent whether what it read stayed whole (a seqlock):
// odd while being written. The newest whole snapshot outlives this process. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/cluster/world.h"

namespace lockstep {

class Snapshots {
 public:
  // Rank 0 reserves both areas. Elsewhere, and without an agent, write() does nothing.
  Snapshots(const World& world, const std::vector<NamedTensor>& tensors);
  // Copies the tensors' present values and tells the agent.
  void write(std::int64_t epoch);

 private:
  const World& world_;
  std::vector<NamedTensor> tensors_;
  std::vector<std::size_t> offsets_;  // of each tensor within an area, after the sequence word
  std::vector<std::span<std::byte>> areas_;
  std::uint64_t writes_ = 0;
};

}  // namespace lockstep
