// A group for slow links: sums of float32 gradients travel in fewer bytes, with error feedback.
//
// A large float32 all_reduce with sum or mean sends every rank's part of the values to the part's
// owner in the wire format; he adds what arrives in canonical order in float32, and sends the sum
// to all in the wire format: 2(p-1)/p of the compressed bytes a rank. The result is the same, bit
// for bit, on every rank and on every run, and follows from the values, the number of ranks and the
// errors kept alone. It is not the exact sum: what the two roundings lose is kept, a rank's own and
// an owner's, and goes with the next call of the same tag, so that over many steps nothing is lost.
// A tag names one tensor or bucket; a call without one keeps no error.
//
// Everything else passes through: other types and reductions, fewer than kLeastCompressed values,
// split()'s groups.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "lockstep/collective/group_wrapper.h"
#include "lockstep/collective/wire_kernels.h"

namespace lockstep {

inline constexpr std::size_t kLeastCompressed = 1024;

class CompressedGroup : public GroupWrapper {
 public:
  using GroupWrapper::GroupWrapper;
  // By tag: this rank's error for each value that it sends, then the owner's for each of its part.
  // For a checkpoint: each rank keeps its own, and sets them before it goes on with as many ranks.
  // One of another length is that of another tensor or number of ranks, and starts anew at zero.
  using Errors = std::map<std::string, std::vector<float>, std::less<>>;
  virtual Errors& errors() = 0;
};

// `nodes`: where every node has equally many ranks of the group, what travels is each node's sum
// instead of each rank's values, a part with each local rank; carriers is set on every rank then.
// None: all ranks of the group send to all.
std::unique_ptr<CompressedGroup> make_compressed_group(std::shared_ptr<Group> group,
                                                       WireFormat format,
                                                       const NodeGroups& nodes = {});

}  // namespace lockstep
