// The gradients of a module as buckets: runs of gradients that are reduced together.
//
// Owner: the group owns the memory, for as long as it lives; the caller keeps the group. Threads:
// as for the module.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/bridge/gradient_place.h"
#include "lockstep/collective/group.h"

namespace lockstep {

struct BucketItem {
  Dtype dtype = Dtype::float32;
  std::size_t bytes = 0;
};
inline constexpr std::size_t kFirstBucketBytes = 1 << 20;
// The cap for gradients of so many bytes that are reduced while backward goes on. Nothing hides how
// long the first bucket takes to fill, nor the last one's way: a sixteenth, within bounds. A link
// of 1 Gbit/s takes 2 to 35 ms for them, of 25 Gbit/s 0.1 to 1.5 ms: more than a call takes to
// begin.
std::size_t overlapped_bucket_bytes(std::size_t total);
// Which items make which bucket, in the order in which the buckets are reduced. As PyTorch's DDP:
// from the last item to the first, about the order in which backward finishes them; one dtype a
// bucket; a bucket is full once it holds `cap_bytes`, each dtype's first one with a quarter of it,
// at most 1 MiB. Without a cap, one bucket a dtype. Pure.
std::vector<std::vector<std::size_t>> plan_buckets(std::span<const BucketItem> items,
                                                   std::optional<std::size_t> cap_bytes);

struct GradientBucket {
  std::vector<std::size_t> parameters;  // indices into what make_buckets() was given
  std::vector<GradientPlace> places;    // one for each
  Dtype dtype = Dtype::float32;
  std::span<std::byte> memory;
  std::string label;        // for messages
  at::Tensor flat;          // all of the memory
  std::size_t missing = 0;  // gradients of this pass that have not arrived
};

// Collective. Throws ConfigError naming a parameter that cannot be averaged. `keep` lives as long
// as any .grad that lies in a bucket.
std::vector<GradientBucket> make_buckets(Group& group, std::shared_ptr<void> keep,
                                         std::span<const NamedTensor> parameters,
                                         std::optional<std::size_t> cap_bytes);

}  // namespace lockstep
