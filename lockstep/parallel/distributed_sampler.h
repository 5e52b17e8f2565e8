// torch.utils.data.DistributedSampler for libtorch's own loaders: every rank takes its share of the
// samples, rank, rank + ranks, rank + 2 ranks, … of one order that all ranks know.
//
//   DistributedSampler sampler(*dataset.size(), world, {.seed = 1});
//   auto loader = torch::data::make_data_loader(dataset, sampler, 64);
//   sampler.set_epoch(epoch);  // the loader's copy follows
//
// Where the samples do not divide evenly, the first ones of the order come twice, or with drop_last
// the last ones are left out, as in PyTorch: all ranks take equally many. make_data_loader
// (data_loader.h) takes every sample exactly once instead.
//
// Owner: copies share the epoch, not the position. Threads: one, as libtorch's loaders use it.
#pragma once

#include <torch/data/samplers/base.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/data/ledger.h"

namespace lockstep {

struct DistributedSamplerOptions {
  bool shuffle = true;
  std::uint64_t seed = 0;  // the same on every rank
  bool drop_last = false;
};

class DistributedSampler : public torch::data::samplers::Sampler<> {
 public:
  // Throws ConfigError: no samples, or fewer than ranks with drop_last.
  DistributedSampler(std::size_t size, const World& world,
                     const DistributedSamplerOptions& options = {});
  DistributedSampler(std::size_t size, std::size_t ranks, std::size_t rank,
                     const DistributedSamplerOptions& options = {});

  // From the next reset() on, which a loader calls when a loop begins.
  void set_epoch(std::uint64_t epoch) { *epoch_ = epoch; }
  std::size_t size() const { return local_; }  // samples an epoch, of this rank

  void reset(std::optional<std::size_t> new_size = std::nullopt) override;
  std::optional<std::vector<std::size_t>> next(std::size_t batch_size) override;
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void resize(std::size_t size);

  std::size_t ranks_, rank_;
  DistributedSamplerOptions options_;
  std::shared_ptr<std::atomic<std::uint64_t>> epoch_;
  std::size_t size_ = 0, local_ = 0, taken_ = 0;
  std::optional<Permutation> order_;  // of the epoch; nothing: as they are
};

}  // namespace lockstep
