// A data loader for one rank: torch::data's map-style data sets, batched in the sample ledger's
// order, so that all ranks together see every sample exactly once an epoch.
//
//   auto loader = make_data_loader(dataset.map(Stack<>()), world, {.batch_size = 64, .seed = 1});
//   loader->set_epoch(epoch);
//   for (auto& batch : *loader) …  // batch.data, batch.target
//
// Owner: the loader owns its data set. Threads: one; batches are made as the loop asks for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/data/ledger.h"

namespace lockstep {

struct DataLoaderOptions {
  std::uint64_t batch_size = 1;  // of one rank, as in PyTorch
  std::uint64_t seed = 0;        // the same on every rank
  bool shuffle = true;
  bool drop_last = false;  // leaves out an epoch's last, short step
};

// Which samples a rank takes. All ranks take the same number of steps; a step's positions are split
// evenly into contiguous parts, one a rank. The last step may be short, and its parts may then
// differ by one: give data_parallel the size, `model.set_weight(batch.data.size(0))`, where the
// loss is a mean. A remainder with fewer samples than ranks joins the step before it (a rank's
// batch is then larger by at most one), so that no batch is empty and no sample lost.
class SampleOrder {
 public:
  // Throws ConfigError: no samples, batch size 0, more ranks than samples, nothing left after
  // drop_last.
  SampleOrder(std::uint64_t samples, int rank, int ranks, const DataLoaderOptions& options);
  std::uint64_t steps() const { return steps_; }
  PositionRange positions(std::uint64_t step) const;  // this rank's
  std::vector<std::size_t> indices(const Ledger::Epoch& epoch, std::uint64_t step) const;
  Ledger::Epoch epoch(std::uint64_t number) const { return ledger_.epoch(number); }

 private:
  std::uint64_t samples_;  // of an epoch, without what is left out
  std::uint64_t step_size_;
  std::uint64_t rank_;
  std::uint64_t ranks_;
  std::uint64_t steps_;
  Ledger ledger_;
};

// The samples of a data set whose size() is an optional, as torch::data's is. Throws ConfigError.
std::uint64_t known_size(std::optional<std::size_t> size);

template <typename Dataset>
class DataLoader {
 public:
  using Batch = decltype(std::declval<Dataset&>().get_batch(std::vector<std::size_t>()));

  DataLoader(Dataset dataset, const World& world, const DataLoaderOptions& options)
      : dataset_(std::move(dataset)),
        order_(known_size(dataset_.size()), world.rank(), world.size(), options) {}

  // Another epoch, another order. Loops in progress keep theirs.
  void set_epoch(std::uint64_t epoch) { epoch_ = epoch; }
  std::uint64_t size() const { return order_.steps(); }  // batches an epoch, the same on every rank

  class Iterator {
   public:
    Iterator(DataLoader& loader, std::uint64_t step)
        : loader_(&loader), epoch_(loader.order_.epoch(loader.epoch_)), step_(step) {}
    Batch& operator*() {
      if (!batch_)
        batch_.emplace(loader_->dataset_.get_batch(loader_->order_.indices(epoch_, step_)));
      return *batch_;
    }
    Batch* operator->() { return &**this; }
    Iterator& operator++() {
      batch_.reset();
      ++step_;
      return *this;
    }
    bool operator==(const Iterator& other) const { return step_ == other.step_; }

   private:
    DataLoader* loader_;
    Ledger::Epoch epoch_;
    std::uint64_t step_;
    std::optional<Batch> batch_;
  };
  Iterator begin() { return Iterator(*this, 0); }
  Iterator end() { return Iterator(*this, order_.steps()); }

 private:
  Dataset dataset_;
  SampleOrder order_;
  std::uint64_t epoch_ = 0;
};

template <typename Dataset>
std::unique_ptr<DataLoader<Dataset>> make_data_loader(Dataset dataset, const World& world,
                                                      const DataLoaderOptions& options = {}) {
  return std::make_unique<DataLoader<Dataset>>(std::move(dataset), world, options);
}

}  // namespace lockstep
