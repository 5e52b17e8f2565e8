#include "lockstep/parallel/distributed_sampler.h"

#include <ATen/ops/scalar_tensor.h>
#include <fmt/format.h>
#include <torch/serialize/archive.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {

DistributedSampler::DistributedSampler(std::size_t size, const World& world,
                                       const DistributedSamplerOptions& options)
    : DistributedSampler(size, static_cast<std::size_t>(world.size()),
                         static_cast<std::size_t>(world.rank()), options) {}

DistributedSampler::DistributedSampler(std::size_t size, std::size_t ranks, std::size_t rank,
                                       const DistributedSamplerOptions& options)
    : ranks_(ranks),
      rank_(rank),
      options_(options),
      epoch_(std::make_shared<std::atomic<std::uint64_t>>(0)) {
  if (rank >= ranks)
    throw ConfigError(fmt::format("DistributedSampler: there is no rank {} of {}", rank, ranks));
  resize(size);
  reset();
}

void DistributedSampler::resize(std::size_t size) {
  if (size == 0) throw ConfigError("DistributedSampler: the data set is empty");
  if (options_.drop_last && size < ranks_)
    throw ConfigError(fmt::format("DistributedSampler: drop_last leaves nothing of {} samples for "
                                  "{} ranks",
                                  size, ranks_),
                      "fewer workers, or drop_last false");
  size_ = size;
  local_ = options_.drop_last ? size / ranks_ : (size + ranks_ - 1) / ranks_;
}

void DistributedSampler::reset(std::optional<std::size_t> new_size) {
  if (new_size) resize(*new_size);
  taken_ = 0;
  if (options_.shuffle) order_.emplace(size_, mix({options_.seed, *epoch_}));
}

std::optional<std::vector<std::size_t>> DistributedSampler::next(std::size_t batch_size) {
  const std::size_t count = std::min(batch_size, local_ - taken_);
  if (count == 0) return std::nullopt;
  std::vector<std::size_t> indices(count);
  for (std::size_t& index : indices) {
    const std::size_t position = (taken_++ * ranks_ + rank_) % size_;
    index = order_ ? (*order_)(position) : position;
  }
  return indices;
}

void DistributedSampler::save(torch::serialize::OutputArchive& archive) const {
  const auto number = [](std::uint64_t value) {
    return at::scalar_tensor(static_cast<std::int64_t>(value), at::kLong);
  };
  archive.write("epoch", number(*epoch_), /*is_buffer=*/true);
  archive.write("taken", number(taken_), /*is_buffer=*/true);
}

void DistributedSampler::load(torch::serialize::InputArchive& archive) {
  const auto number = [&](const char* key) {
    at::Tensor tensor;
    archive.read(key, tensor, /*is_buffer=*/true);
    return tensor.item<std::int64_t>();
  };
  *epoch_ = static_cast<std::uint64_t>(number("epoch"));
  reset();
  taken_ = static_cast<std::size_t>(
      std::clamp<std::int64_t>(number("taken"), 0, static_cast<std::int64_t>(local_)));
}

}  // namespace lockstep
