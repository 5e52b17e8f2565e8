// The trainer in one generation after another: workers are threads at the seats of a segment, the
// test is their agent. Whoever dies, joins or leaves, whenever: the weights are those of a run that
// nothing happened to, and every step is reported as it was there.
#include <ATen/ops/mse_loss.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/parallel/generations_test.h"
#include "lockstep/train/trainer.h"

namespace lockstep {
namespace {

class Rows : public BatchSource {
 public:
  std::uint64_t size() const override { return 56; }
  Batch batch(std::span<const std::uint64_t> indices) const override {
    Batch batch{at::empty({static_cast<std::int64_t>(indices.size()), 6}), {}};
    float* out = batch.input.mutable_data_ptr<float>();
    for (const std::uint64_t index : indices)
      for (std::uint64_t i = 0; i < 6; ++i)
        *out++ = static_cast<float>(mix({index, i}) % 1000) / 500 - 1;
    batch.target = batch.input.sum(1, true).sin();
    return batch;
  }
};

struct Outcome {
  std::vector<at::Tensor> tensors;
  std::vector<EpochSummary> epochs;
  std::int64_t steps = 0;
};

// One worker's life. hook(): called before each loss, with the number of losses so far.
using Hook = std::function<void(const World&, std::int64_t losses)>;

class Cluster : public Generations {
 public:
  using Generations::Generations;
  ~Cluster() { join(); }

  void start(int seat, Hook hook = {}) { start_at({0, seat}, std::move(hook)); }
  void start_at(Seat at, Hook hook = {}) {
    Generations::start(at, [this, at, hook = std::move(hook)](const World& world) {
      work(world, 12 * at.node + at.seat, hook);
    });
  }
  Outcome outcome() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return outcome_.has_value(); });
    return *outcome_;
  }

  TrainerOptions options{.epochs = 3,
                         .global_batch_size = 16,
                         .virtual_ranks = 4,
                         .shuffle = true,
                         .clip_grad_norm = 0.5};

 private:
  void work(const World& world, int seat, const Hook& hook) {
    torch::nn::Sequential net(torch::nn::Linear(6, 8), torch::nn::BatchNorm1d(8),
                              torch::nn::Linear(8, 1));
    {
      const at::NoGradGuard no_grad;
      float value = static_cast<float>(seat);  // that of rank 0 counts: seat 0's
      for (at::Tensor& parameter : net->parameters()) parameter.fill_(value += 0.01f);
      net->parameters()[0].copy_(at::linspace(-1, 1, 48).view({8, 6}));
    }
    std::int64_t losses = 0;
    const auto loss = [&](const at::Tensor& output, const at::Tensor& target) -> LossValue {
      if (hook) hook(world, losses++);
      return {at::mse_loss(output, target, at::Reduction::Sum), double(output.size(0))};
    };
    const Rows rows;
    TrainerOptions mine = options;
    const FitReport report = Trainer(world, mine).fit(net, Adam({.lr = 0.01}), rows, rows, loss);
    if (!report.is_member) return;
    const std::lock_guard lock(mutex_);
    if (outcome_) return;
    outcome_.emplace();
    for (const at::Tensor& tensor : net->parameters()) outcome_->tensors.push_back(tensor.clone());
    for (const at::Tensor& tensor : net->buffers()) outcome_->tensors.push_back(tensor.clone());
    outcome_->epochs = report.epochs;
    outcome_->steps = report.steps;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Outcome> outcome_;
};

const Outcome& undisturbed() {
  static const Outcome outcome = [] {
    Cluster cluster(1, 1);
    cluster.start(0);
    cluster.say({0}, true);
    return cluster.outcome();
  }();
  return outcome;
}

void expect_the_same(const Outcome& found) {
  const Outcome& expected = undisturbed();
  ASSERT_EQ(found.tensors.size(), expected.tensors.size());
  for (std::size_t i = 0; i < found.tensors.size(); ++i)
    EXPECT_TRUE(at::equal(found.tensors[i], expected.tensors[i])) << "tensor " << i;
  ASSERT_EQ(found.epochs.size(), expected.epochs.size());
  for (std::size_t i = 0; i < found.epochs.size(); ++i) {
    EXPECT_EQ(found.epochs[i].step, expected.epochs[i].step);
    EXPECT_EQ(found.epochs[i].samples, expected.epochs[i].samples);
    EXPECT_EQ(found.epochs[i].train_loss, expected.epochs[i].train_loss);
    EXPECT_EQ(found.epochs[i].test_loss, expected.epochs[i].test_loss);
  }
}

TEST(Elastic, ThreeWorkersGiveTheBitsOfOne) {
  Cluster cluster(3, 3);
  for (const int seat : {0, 1, 2}) cluster.start(seat);
  cluster.say({0, 1, 2}, true);
  expect_the_same(cluster.outcome());
}

TEST(Elastic, NodesGiveTheBitsOfOneWorker) {
  Cluster cluster(3, 3, 2);
  for (const Cluster::Seat at : {Cluster::Seat{0, 0}, {1, 0}, {1, 1}}) cluster.start_at(at);
  cluster.say_nodes({{0}, {0, 1}}, true);
  expect_the_same(cluster.outcome());
}

// At every loss that it computes: rank 0 and all that its node knew, or the other.
TEST(Elastic, ANodeDiesAndIsReplaced) {
  for (const int victim : {0, 1})
    for (std::int64_t when = 0; when < 24; when += 1 + when % 3) {
      SCOPED_TRACE(testing::Message() << "node " << victim << " at loss " << when);
      Cluster cluster(2, 2, 3);
      std::atomic<bool> dead = false;
      cluster.start_at({1 - victim, 0});
      cluster.start_at({2, 0});
      cluster.start_at({victim, 0}, [&](const World&, std::int64_t losses) {
        if (losses != when) return;
        dead = true;
        dead.notify_all();
        throw Killed{};
      });
      cluster.say_nodes({{0}, {0}}, true);
      dead.wait(false);
      cluster.say_nodes(victim == 0 ? std::vector<std::vector<int>>{{}, {0}, {0}}
                                    : std::vector<std::vector<int>>{{0}, {}, {0}},
                        true);
      expect_the_same(cluster.outcome());
    }
}

// At every loss that a worker of two computes, in an epoch's steps or its evaluation.
TEST(Elastic, AWorkerDiesAndIsReplaced) {
  for (const bool first : {false, true})
    for (std::int64_t when = 0; when < 24; ++when) {
      SCOPED_TRACE(testing::Message() << (first ? "rank 0" : "rank 1") << " at loss " << when);
      Cluster cluster(2, 2);
      const int victim = first ? 0 : 1, other = first ? 1 : 0;
      std::atomic<bool> dead = false;
      cluster.start(other);
      cluster.start(victim, [&](const World&, std::int64_t losses) {
        if (losses != when) return;
        dead = true;
        dead.notify_all();
        throw Killed{};
      });
      cluster.say({0, 1}, true);
      dead.wait(false);
      cluster.start(2);
      cluster.say({other, 2}, true);
      expect_the_same(cluster.outcome());
    }
}

TEST(Elastic, TheWorldShrinksAndGrows) {
  Cluster cluster(1, 4);
  std::uint64_t planned = 0;
  cluster.start(0, [&](const World& world, std::int64_t) {
    // A generation is planned when the one before has been taken up.
    if (std::exchange(planned, world.generation()) == world.generation()) return;
    if (planned == 1) cluster.say({0, 1, 3, 4}, false, "seat 4 joins");
    if (planned == 2) cluster.say({0, 4}, false, "scaled down");
  });
  for (const int seat : {1, 3, 4}) cluster.start(seat);
  cluster.start(2, [&](const World&, std::int64_t losses) {
    if (losses != 3) return;
    cluster.say({0, 1, 3}, true, "seat 2 is lost");
    throw Killed{};
  });
  cluster.say({0, 1, 2, 3}, true);
  expect_the_same(cluster.outcome());
}

TEST(Elastic, AllDieAndOthersTakeOver) {
  Cluster cluster(2, 2);
  std::atomic<int> dead = 0;
  for (const int seat : {0, 1})
    cluster.start(seat, [&](const World& world, std::int64_t losses) {
      if (losses != (world.rank() == 0 ? 11 : 12)) return;
      ++dead;
      dead.notify_all();
      throw Killed{};
    });
  cluster.say({0, 1}, true);
  dead.wait(0);
  cluster.say({2, 3}, true,
              "all are lost");  // the second death is one of a generation that is over
  for (const int seat : {2, 3}) cluster.start(seat);
  expect_the_same(cluster.outcome());
}

// Its word is not lost when others join at the end of that very step.
TEST(Elastic, ACallbackStopsAStepThatEndsAGeneration) {
  Cluster cluster(2, 2);
  std::atomic<bool> said = false;
  cluster.options.epochs = 1000;
  cluster.options.callbacks.on_step = [&](const StepSummary& step) {
    if (step.step == 5 && !said.exchange(true)) cluster.say({0, 1}, false);
    return step.step != 6 && step.step != 7;  // every rank has seen the generation by the sixth
  };
  for (const int seat : {0, 1}) cluster.start(seat);
  cluster.say({0, 1}, true);
  EXPECT_EQ(cluster.outcome().steps, 6);
  EXPECT_EQ(cluster.outcome().epochs.size(), 1u);
}

// Nor when the generation is over before the others have heard of it.
TEST(Elastic, ACallbackStopsAnEpochWhoseEndIsDoneAgain) {
  Cluster cluster(2, 2);
  std::atomic<bool> said = false;
  cluster.options.epochs = 1000;
  cluster.options.callbacks.on_epoch = [&](const EpochSummary& epoch) {
    if (epoch.epoch != 2) return true;
    if (!said.exchange(true)) cluster.say({0, 1}, true);
    return false;
  };
  for (const int seat : {0, 1}) cluster.start(seat);
  cluster.say({0, 1}, true);
  EXPECT_EQ(cluster.outcome().epochs.size(), 2u);
}

TEST(Elastic, AskedToStopItEndsAfterTheStep) {
  Cluster cluster(2, 2);
  std::atomic<bool> reached = false;
  cluster.options.epochs = 100000;
  for (const int seat : {0, 1})
    cluster.start(seat, [&](const World&, std::int64_t losses) {
      if (losses == 9) request_stop(cluster.segment());
    });
  cluster.say({0, 1}, true);
  EXPECT_LT(cluster.outcome().epochs.size(), 3u);
}

}  // namespace
}  // namespace lockstep
