#include "lockstep/parallel/gradient_buckets.h"

#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "lockstep/base/error.h"
#include "lockstep/bridge/dtypes.h"

namespace lockstep {

std::size_t overlapped_bucket_bytes(std::size_t total) {
  return std::clamp<std::size_t>(total / 16, 256 << 10, 4 << 20);
}

std::vector<std::vector<std::size_t>> plan_buckets(std::span<const BucketItem> items,
                                                   std::optional<std::size_t> cap_bytes) {
  struct Open {
    std::vector<std::size_t> items = {};
    std::size_t bytes = 0;
    bool first = true;
  };
  std::array<Open, kDtypeCount> open;
  std::vector<std::vector<std::size_t>> buckets;
  for (std::size_t i = items.size(); i-- > 0;) {
    Open& bucket = open[static_cast<std::size_t>(items[i].dtype)];
    bucket.items.push_back(i);
    bucket.bytes += items[i].bytes;
    if (!cap_bytes ||
        bucket.bytes < (bucket.first ? std::min(kFirstBucketBytes, *cap_bytes / 4) : *cap_bytes))
      continue;
    buckets.push_back(std::exchange(bucket, {.first = false}).items);
  }
  for (Open& bucket : open)
    if (!bucket.items.empty()) buckets.push_back(std::move(bucket.items));
  return buckets;
}

std::vector<GradientBucket> make_buckets(Group& group, std::shared_ptr<void> keep,
                                         std::span<const NamedTensor> parameters,
                                         std::optional<std::size_t> cap_bytes) {
  std::vector<BucketItem> items;
  for (const NamedTensor& one : parameters) {
    const std::optional<Dtype> dtype = dtype_from(one.tensor.scalar_type());
    if (!dtype || !is_floating_point(*dtype))
      throw ConfigError(fmt::format("data_parallel: parameter '{}' is {}: it cannot be averaged",
                                    one.name, c10::toString(one.tensor.scalar_type())));
    items.push_back({*dtype, one.tensor.nbytes()});
  }
  std::vector<GradientBucket> buckets;
  for (std::vector<std::size_t>& members : plan_buckets(items, cap_bytes)) {
    GradientBucket& bucket = buckets.emplace_back();
    bucket.parameters = std::move(members);
    std::vector<NamedTensor> tensors;
    for (const std::size_t i : bucket.parameters) tensors.push_back(parameters[i]);
    bucket.label = tensors.size() == 1 ? fmt::format("gradient of {}", tensors.front().name)
                                       : fmt::format("gradients of {} and {} more",
                                                     tensors.front().name, tensors.size() - 1);
    bucket.dtype = items[bucket.parameters.front()].dtype;
    const ParameterLayout layout = make_layout(tensors, bucket.dtype);
    bucket.memory = group.allocate(layout.bytes(), "gradients");
    bucket.flat = at::from_blob(bucket.memory.data(), {static_cast<std::int64_t>(layout.total)},
                                at::TensorOptions().dtype(scalar_type_from(bucket.dtype)));
    for (std::size_t i = 0; i < tensors.size(); ++i)
      bucket.places.emplace_back(tensors[i].tensor, bucket.memory, layout, i, keep);
  }
  return buckets;
}

}  // namespace lockstep
