// A data loader for one rank: torch::data's map-style data sets, batched in the sample ledger's
// order, so that all ranks together see every sample exactly once an epoch.
//
//   auto loader = make_data_loader(dataset.map(Stack<>()), world, {.batch_size = 64, .seed = 1});
//   loader->set_epoch(epoch);
//   for (auto& batch : *loader) …  // batch.data, batch.target
//
// With num_workers, threads make batches ahead of the loop, each with its own copy of the data set
// (as libtorch's loaders do): what copies share must bear several readers. The batches and their
// order are the same for any number, as long as a sample follows from its index alone. What the
// data set throws, the loop throws, at the batch it belongs to. A loop left in the middle ends its
// threads.
//
// Owner: the loader owns its data set and outlives its loops. Threads: one runs the loops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/data/ledger.h"
#include "lockstep/parallel/prefetcher.h"

namespace lockstep {

struct DataLoaderOptions {
  std::uint64_t batch_size = 1;  // of one rank, as in PyTorch
  std::uint64_t seed = 0;        // the same on every rank
  bool shuffle = true;
  bool drop_last = false;             // leaves out an epoch's last, short step
  int num_workers = 0;                // threads that make batches; 0: the loop makes them itself
  std::uint64_t prefetch_factor = 2;  // batches that each of them may be ahead
  Clock::duration timeout{};          // of a wait for a batch; 0: none
  // Which samples go together (data/partition.h); a rank is a virtual rank. With range and hash no
  // step is short: drop_last leaves out nothing.
  Partition partition = {};
};

// Which samples a rank takes. All ranks take the same number of steps; a step's positions are split
// evenly into contiguous parts, one a rank. The last step may be short, and its parts may then
// differ by one: give data_parallel the size, `model.set_weight(batch.data.size(0))`, where the
// loss is a mean. A remainder with fewer samples than ranks joins the step before it (a rank's
// batch is then larger by at most one), so that no batch is empty and no sample lost.
class SampleOrder {
 public:
  // Throws ConfigError: no samples, batch size 0, more ranks than samples, nothing left after
  // drop_last, a partition that does not fit.
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
        order_(known_size(dataset_.size()), world.rank(), world.size(), options),
        workers_(options.num_workers),
        ahead_(options.prefetch_factor * static_cast<std::uint64_t>(options.num_workers)),
        timeout_(options.timeout) {}

  // Another epoch, another order. Loops in progress keep theirs.
  void set_epoch(std::uint64_t epoch) { epoch_ = epoch; }
  std::uint64_t size() const { return order_.steps(); }  // batches an epoch, the same on every rank

  // Copies share the batches: advance one of them.
  class Iterator {
   public:
    Iterator(DataLoader& loader, std::uint64_t step)
        : loader_(&loader), epoch_(loader.order_.epoch(loader.epoch_)), step_(step) {
      if (loader.workers_ > 0 && step < loader.size()) ahead_ = loader.prefetch(epoch_);
    }
    Batch& operator*() {
      if (!batch_)
        batch_.emplace(ahead_ ? ahead_->take(loader_->deadline())
                              : loader_->make(loader_->dataset_, epoch_, step_));
      return *batch_;
    }
    Batch* operator->() { return &**this; }
    Iterator& operator++() {
      if (ahead_ && !batch_) **this;  // passed over, but next in the row
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
    std::shared_ptr<Prefetcher<Batch>> ahead_;
  };
  Iterator begin() { return Iterator(*this, 0); }
  Iterator end() { return Iterator(*this, order_.steps()); }

 private:
  Batch make(Dataset& dataset, const Ledger::Epoch& epoch, std::uint64_t step) const {
    return dataset.get_batch(order_.indices(epoch, step));
  }
  std::shared_ptr<Prefetcher<Batch>> prefetch(const Ledger::Epoch& epoch) const {
    auto copies = std::make_shared<std::vector<Dataset>>();
    for (int worker = 0; worker < workers_; ++worker) copies->push_back(dataset_);
    return std::make_shared<Prefetcher<Batch>>(
        order_.steps(), workers_, ahead_, [this, epoch, copies](int worker, std::uint64_t step) {
          return make((*copies)[static_cast<std::size_t>(worker)], epoch, step);
        });
  }
  Deadline deadline() const {
    return timeout_ == Clock::duration::zero() ? Deadline::never() : Deadline::after(timeout_);
  }

  Dataset dataset_;
  SampleOrder order_;
  int workers_;
  std::uint64_t ahead_;
  Clock::duration timeout_;
  std::uint64_t epoch_ = 0;
};

template <typename Dataset>
std::unique_ptr<DataLoader<Dataset>> make_data_loader(Dataset dataset, const World& world,
                                                      const DataLoaderOptions& options = {}) {
  return std::make_unique<DataLoader<Dataset>>(std::move(dataset), world, options);
}

}  // namespace lockstep
