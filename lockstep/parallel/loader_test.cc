// The loader's threads, its partitions, and the sampler for libtorch's own loaders.
#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/data/dataloader.h>
#include <torch/data/datasets/base.h>
#include <torch/data/datasets/map.h>
#include <torch/data/transforms/stack.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <numeric>
#include <semaphore>
#include <set>
#include <sstream>

#include "lockstep/base/error.h"
#include "lockstep/parallel/data_loader.h"
#include "lockstep/parallel/distributed_sampler.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

struct Watch {
  std::atomic<int> made{0};
  std::size_t throws_at = ~std::size_t{0};
  std::counting_semaphore<>* gate = nullptr;  // a batch waits for it
};

// Sample i is i and its square.
class Squares : public torch::data::datasets::Dataset<Squares> {
 public:
  explicit Squares(std::size_t size, Watch* watch = nullptr) : size_(size), watch_(watch) {}
  torch::data::Example<> get(std::size_t index) override {
    if (watch_ != nullptr) {
      if (watch_->gate != nullptr) watch_->gate->acquire();
      if (index == watch_->throws_at) throw std::runtime_error("sample is broken");
      ++watch_->made;
    }
    const auto value = static_cast<float>(index);
    return {at::full({1}, value), at::full({1}, value * value)};
  }
  std::optional<std::size_t> size() const override { return size_; }

 private:
  std::size_t size_;
  Watch* watch_;
};

auto loader_of(std::size_t size, const DataLoaderOptions& options, Watch* watch = nullptr,
               const World& world = init_from(Place{}, {})) {
  return make_data_loader(Squares(size, watch).map(torch::data::transforms::Stack<>()), world,
                          options);
}

template <typename Loader>
std::vector<float> all_of(Loader& loader) {
  std::vector<float> all;
  for (auto& batch : loader) {
    EXPECT_TRUE(batch.target.equal(batch.data * batch.data));
    const float* values = batch.data.template const_data_ptr<float>();
    all.push_back(-static_cast<float>(batch.data.size(0)));
    all.insert(all.end(), values, values + batch.data.size(0));
  }
  return all;
}

TEST(DataLoader, SameBatchesForAnyNumberOfWorkers) {
  for (const std::uint64_t epoch : {0, 1}) {
    std::vector<float> expected;
    for (const int workers : {0, 1, 2, 5}) {
      for (const std::uint64_t ahead : {1, 3}) {
        auto loader = loader_of(
            103, {.batch_size = 8, .seed = 3, .num_workers = workers, .prefetch_factor = ahead});
        loader->set_epoch(epoch);
        const std::vector<float> all = all_of(*loader);
        if (expected.empty()) expected = all;
        EXPECT_EQ(all, expected) << workers << " workers, " << ahead << " ahead";
        EXPECT_EQ(all_of(*loader), expected) << "a second loop";
      }
    }
    EXPECT_EQ(expected.size(), 103u + 13u);
  }
}

TEST(DataLoader, WorkersStayAheadByNoMoreThanAsked) {
  Watch watch;
  std::counting_semaphore<> gate(0);
  watch.gate = &gate;
  auto loader = loader_of(100, {.batch_size = 1, .num_workers = 2, .prefetch_factor = 3}, &watch);
  gate.release(1000);
  auto first = loader->begin();
  while (watch.made < 6) std::this_thread::yield();  // ctest's time limit ends a hang
  *first;
  ++first;
  while (watch.made < 7) std::this_thread::yield();
  EXPECT_LE(watch.made, 7);
}

TEST(DataLoader, WhatTheDataSetThrowsComesOutAtItsBatch) {
  for (const int workers : {0, 2}) {
    Watch watch;
    watch.throws_at = 13;
    auto loader =
        loader_of(20, {.batch_size = 2, .shuffle = false, .num_workers = workers}, &watch);
    int batches = 0;
    try {
      for (auto& batch : *loader) batches += batch.data.defined() ? 1 : 0;
      ADD_FAILURE() << "not thrown";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "sample is broken");
    }
    EXPECT_EQ(batches, 6);
  }
}

TEST(DataLoader, ALoopLeftInTheMiddleEndsItsThreads) {
  Watch watch;
  auto loader = loader_of(1000, {.batch_size = 1, .num_workers = 4, .prefetch_factor = 2}, &watch);
  for (int round = 0; round < 20; ++round) {
    int batches = 0;
    for (auto& batch : *loader)
      if (batch.data.defined() && ++batches == 3) break;
    const int made = watch.made;  // every thread has ended
    EXPECT_LE(made, (round + 1) * 11);
    EXPECT_EQ(watch.made, made);
  }
}

TEST(DataLoader, ABatchThatIsNotMadeInTimeIsAnError) {
  Watch watch;
  std::counting_semaphore<> gate(0);
  watch.gate = &gate;
  auto loader = loader_of(
      4, {.batch_size = 2, .num_workers = 1, .timeout = std::chrono::milliseconds(1)}, &watch);
  {
    auto first = loader->begin();
    try {
      *first;
      ADD_FAILURE() << "not thrown";
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("batch 0 was not made in time"));
    }
    gate.release(4);
  }
}

TEST(DataLoader, RefusesSettingsThatMeanNothing) {
  EXPECT_THROW(loader_of(4, {.num_workers = -1}), ConfigError);
  EXPECT_THROW(loader_of(4, {.num_workers = 1, .prefetch_factor = 0}), ConfigError);
  EXPECT_THROW(loader_of(4, {.partition = {Partition::Kind::hash, {1, 2}}}), ConfigError);
}

TEST(DataLoader, Partitions) {
  const std::vector<std::uint64_t> keys = [] {
    std::vector<std::uint64_t> found(90);
    for (std::uint64_t i = 0; i < 90; ++i) found[i] = i % 9;
    return found;
  }();
  for (const auto kind :
       {Partition::Kind::range, Partition::Kind::hash, Partition::Kind::stratified}) {
    std::vector<std::size_t> all;
    std::map<std::uint64_t, std::set<int>> homes;
    for (int rank = 0; rank < 3; ++rank) {
      const SampleOrder order(90, rank, 3, {.batch_size = 6, .partition = {kind, keys}});
      EXPECT_EQ(order.steps(), 5u);
      for (std::uint64_t step = 0; step < order.steps(); ++step)
        for (const std::size_t index : order.indices(order.epoch(2), step)) {
          all.push_back(index);
          homes[keys[index]].insert(rank);
          EXPECT_TRUE(kind != Partition::Kind::range ||
                      index / 30 == static_cast<std::size_t>(rank));
        }
    }
    for (const auto& [key, ranks] : homes)
      EXPECT_TRUE(kind != Partition::Kind::hash || ranks.size() == 1) << key;
    std::ranges::sort(all);
    std::vector<std::size_t> expected(90);
    std::iota(expected.begin(), expected.end(), 0);
    EXPECT_EQ(all, expected) << name_of(kind);
  }
  std::vector<double> weights(90, 0.0);
  weights[7] = weights[80] = 1;
  auto loader = loader_of(
      90,
      {.batch_size = 9, .num_workers = 2, .partition = {Partition::Kind::weighted, {}, weights}});
  std::set<float> seen;
  for (auto& batch : *loader)
    for (int i = 0; i < 9; ++i) seen.insert(batch.data.template const_data_ptr<float>()[i]);
  EXPECT_EQ(seen, (std::set<float>{7, 80}));
}

std::vector<std::size_t> rest_of(DistributedSampler& sampler, std::size_t batch = 4) {
  std::vector<std::size_t> all;
  while (const auto indices = sampler.next(batch)) {
    EXPECT_LE(indices->size(), batch);
    all.insert(all.end(), indices->begin(), indices->end());
  }
  return all;
}

TEST(DistributedSampler, SharesAreAsInPyTorch) {
  // torch.utils.data.DistributedSampler(range(10), 4, rank, shuffle=False, drop_last=…)
  const auto share = [](std::size_t rank, bool drop_last) {
    DistributedSampler sampler(10, 4, rank, {.shuffle = false, .drop_last = drop_last});
    return rest_of(sampler);
  };
  using Indices = std::vector<std::size_t>;
  EXPECT_EQ(share(0, false), (Indices{0, 4, 8}));
  EXPECT_EQ(share(2, false), (Indices{2, 6, 0}));
  EXPECT_EQ(share(3, false), (Indices{3, 7, 1}));
  EXPECT_EQ(share(0, true), (Indices{0, 4}));
  EXPECT_EQ(share(3, true), (Indices{3, 7}));
}

TEST(DistributedSampler, ShufflesEachEpochAndTakesEverySample) {
  std::set<std::vector<std::size_t>> orders;
  for (const std::uint64_t epoch : {0, 1, 2}) {
    std::vector<std::size_t> all;
    for (std::size_t rank = 0; rank < 3; ++rank) {
      DistributedSampler sampler(30, 3, rank, {.seed = 5});
      sampler.set_epoch(epoch);
      sampler.reset();
      const auto own = rest_of(sampler);
      EXPECT_EQ(own.size(), sampler.size());
      all.insert(all.end(), own.begin(), own.end());
    }
    orders.insert(all);
    EXPECT_EQ(std::set<std::size_t>(all.begin(), all.end()).size(), 30u);
  }
  EXPECT_EQ(orders.size(), 3u);
}

TEST(DistributedSampler, DrivesLibtorchsLoader) {
  DistributedSampler sampler(20, 2, 1, {.seed = 5});
  auto loader =
      torch::data::make_data_loader(Squares(20).map(torch::data::transforms::Stack<>()), sampler,
                                    torch::data::DataLoaderOptions(4).workers(2));
  std::vector<float> first, second;
  for (auto& batch : *loader)
    for (int i = 0; i < batch.data.size(0); ++i)
      first.push_back(batch.data.const_data_ptr<float>()[i]);
  sampler.set_epoch(1);
  for (auto& batch : *loader)
    for (int i = 0; i < batch.data.size(0); ++i)
      second.push_back(batch.data.const_data_ptr<float>()[i]);
  EXPECT_EQ(first.size(), 10u);
  EXPECT_EQ(second.size(), 10u);
  EXPECT_NE(first, second);
}

TEST(DistributedSampler, SavesWhereItIs) {
  DistributedSampler sampler(20, 2, 1, {.seed = 5});
  sampler.set_epoch(4);
  sampler.reset();
  sampler.next(3);
  std::stringstream file;
  torch::serialize::OutputArchive out;
  sampler.save(out);
  out.save_to(file);
  torch::serialize::InputArchive in;
  in.load_from(file);
  DistributedSampler other(20, 2, 1, {.seed = 5});
  other.load(in);
  EXPECT_EQ(rest_of(other), rest_of(sampler));
}

TEST(DistributedSampler, RefusesWhatLeavesNothing) {
  EXPECT_THROW(DistributedSampler(0, 1, 0), ConfigError);
  EXPECT_THROW(DistributedSampler(3, 4, 4), ConfigError);
  EXPECT_THROW(DistributedSampler(3, 4, 0, {.drop_last = true}), ConfigError);
}

}  // namespace
}  // namespace lockstep
