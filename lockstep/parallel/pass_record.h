// What ranks tell each other about a backward pass before its gradients are averaged, so that what
// is wrong on one is the same error on all. The exchange is collective; the rest is pure.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/collective/group.h"

namespace lockstep {

enum class GradientProblem : std::uint8_t { none, frozen, has_graph, left_over };

struct PassRecord {
  double weight = 1;
  bool active = true;  // not: takes part in the others' passes only, having run out of batches
  GradientProblem problem = GradientProblem::none;
  std::uint32_t parameter = 0;  // which has the problem
  std::vector<bool> used = {};  // by parameter: has a gradient since the last average
};

// All ranks' records, in order of rank.
std::vector<PassRecord> exchange(Group& group, const PassRecord& mine);

// Throws ConfigError for the first rank's problem, if there is one.
void check_problems(std::span<const PassRecord> records, std::span<const NamedTensor> parameters);
// Throws ConfigError naming trained parameters that an active rank did not use, and the ranks.
void check_all_used(std::span<const PassRecord> records, std::span<const NamedTensor> parameters,
                    const std::vector<bool>& trained);

}  // namespace lockstep
