// Ranks are threads that share one segment, each with a module of its own. Convergence on a real
// task: recipes/slow_links_test.cc.
#include "lockstep/parallel/local_sgd.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include "lockstep/parallel/replicas_test.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Tensors = std::vector<at::Tensor>;

constexpr int kSteps = 14;

void step_alone(Net& net, torch::optim::Optimizer& optimizer, int rank, int step) {
  optimizer.zero_grad();
  loss_of(net->forward(inputs(rank, step)), step).backward();
  optimizer.step();
}

// One process doing the same. `agree` turns the average change into new parameters.
using Agree = std::function<void(Tensors& agreed, const Tensors& change)>;
Tensors train_alone(int ranks, const std::function<bool(int)>& meets_after, const Agree& agree) {
  std::vector<Net> nets;
  std::vector<std::unique_ptr<torch::optim::AdamW>> optimizers;
  for (int rank = 0; rank < ranks; ++rank) {
    nets.emplace_back(1);
    optimizers.push_back(std::make_unique<torch::optim::AdamW>(nets.back()->parameters(), 0.01));
  }
  Tensors agreed = values_of(*nets[0]);
  for (int step = 1; step <= kSteps; ++step) {
    for (int rank = 0; rank < ranks; ++rank) step_alone(nets[rank], *optimizers[rank], rank, step);
    if (!meets_after(step)) continue;
    Tensors change;
    for (std::size_t i = 0; i < agreed.size(); ++i) {
      Tensors changes;
      for (const Net& net : nets) changes.push_back(net->parameters()[i].detach() - agreed[i]);
      change.push_back(tree_sum(changes) / ranks);
    }
    agree(agreed, change);
    const at::NoGradGuard no_grad;
    for (const Net& net : nets)
      for (std::size_t i = 0; i < agreed.size(); ++i) net->parameters()[i].copy_(agreed[i]);
  }
  return agreed;
}

// As every rank; what all have in the end.
template <typename Strategy, typename Options>
void expect_on_ranks(int ranks, const Options& options, const Tensors& expected) {
  Results results;
  run_ranks(ranks, [&](const World& world) {
    Net net(1 + world.rank());  // rank 0's values must reach all
    Strategy strategy(*net, world, options);
    torch::optim::AdamW optimizer(net->parameters(), 0.01);
    for (int step = 1; step <= kSteps; ++step) {
      step_alone(net, optimizer, world.rank(), step);
      strategy.step();
    }
    strategy.synchronize();
    results.put(world.rank(), values_of(*net));
  });
  results.expect_all(ranks, expected);
}

TEST(LocalSgd, EqualsOneProcess) {
  const Agree average = [](Tensors& agreed, const Tensors& change) {
    for (std::size_t i = 0; i < agreed.size(); ++i) agreed[i].add_(change[i]);
  };
  for (const int ranks : {2, 3}) {
    // 14 steps; the end is a meeting, too.
    expect_on_ranks<LocalSgd>(
        ranks, LocalSgdOptions{.sync_every = 4},
        train_alone(
            ranks, [](int step) { return step % 4 == 0 || step == kSteps; }, average));
    expect_on_ranks<LocalSgd>(
        ranks, LocalSgdOptions{.sync_every = 3, .warmup_steps = 5},
        train_alone(
            ranks, [](int step) { return step <= 5 || step % 3 == 2; }, average));
  }
}

TEST(DiLoCo, EqualsOneProcessWithTorchsOuterOptimizer) {
  for (const bool nesterov : {true, false}) {
    Tensors outer;  // what torch's optimizer steps
    std::unique_ptr<torch::optim::SGD> optimizer;
    const Agree agree = [&](Tensors& agreed, const Tensors& change) {
      if (!optimizer) {
        for (const at::Tensor& one : agreed) outer.push_back(one.clone().requires_grad_());
        optimizer = std::make_unique<torch::optim::SGD>(
            outer, torch::optim::SGDOptions(0.7).momentum(0.9).nesterov(nesterov));
      }
      for (std::size_t i = 0; i < agreed.size(); ++i) outer[i].mutable_grad() = -change[i];
      optimizer->step();
      for (std::size_t i = 0; i < agreed.size(); ++i) agreed[i].copy_(outer[i].detach());
    };
    const Tensors expected = train_alone(
        2, [](int step) { return step % 5 == 0 || step == kSteps; }, agree);
    expect_on_ranks<DiLoCo>(2, DiLoCoOptions{.sync_every = 5, .nesterov = nesterov}, expected);
  }
}

TEST(LocalSteps, StepTellsOfMeetingsAndInt8StaysEqualOnAllRanks) {
  Results results;
  Tensors of_rank_0;
  run_ranks(3, [&](const World& world) {
    torch::nn::Linear net(64, 64);
    DiLoCo strategy(*net, world, {.sync_every = 3, .wire_format = WireFormat::int8});
    torch::optim::SGD optimizer(net->parameters(), 0.1);
    std::vector<int> met;
    for (int step = 1; step <= 7; ++step) {
      optimizer.zero_grad();
      net->forward(numbers({4, 64}, 10 * step + world.rank())).square().mean().backward();
      optimizer.step();
      if (strategy.step()) met.push_back(step);
    }
    EXPECT_EQ(met, (std::vector<int>{3, 6}));
    strategy.synchronize();
    EXPECT_EQ(strategy.wire_errors().size(), 1u);
    if (world.rank() == 0) of_rank_0 = values_of(*net);
    world.group().barrier();
    results.put(world.rank(), values_of(*net));
  });
  results.expect_all(3, of_rank_0);
}

TEST(LocalSteps, GoesOnFromItsStateWithTheSameBits) {
  run_ranks(2, [](const World& world) {
    const auto run = [&](Net& net, DiLoCo& strategy, int first, int last) {
      torch::optim::SGD optimizer(net->parameters(), 0.05);
      for (int step = first; step <= last; ++step) {
        step_alone(net, optimizer, world.rank(), step);
        strategy.step();
      }
    };
    Net net(1), same(1), other(2);
    const DiLoCoOptions options{.sync_every = 4};
    DiLoCo unbroken(*net, world, options), first(*same, world, options);
    run(net, unbroken, 1, 12);
    run(same, first, 1, 8);
    DiLoCo second(*other, world, options);
    {
      const at::NoGradGuard no_grad;
      for (std::size_t i = 0; i < net->parameters().size(); ++i)
        other->parameters()[i].copy_(same->parameters()[i]);
      for (std::size_t i = 0; i < first.state().size(); ++i)
        second.state()[i].tensor.copy_(first.state()[i].tensor);
    }
    run(other, second, 9, 12);
    expect_equal(values_of(*other), values_of(*net));
  });
}

TEST(LocalSteps, BuffersAreAveraged) {
  run_ranks(2, [](const World& world) {
    torch::nn::BatchNorm1d norm(7);
    LocalSgd strategy(*norm, world, {.sync_every = 1});
    norm->running_mean.fill_(world.rank() == 0 ? 1.0 : 4.0);
    strategy.step();
    EXPECT_TRUE(at::equal(norm->running_mean, at::full({7}, 2.5)));
  });
}

TEST(LocalSteps, AloneAnAverageChangesNothing) {
  Net net(1), plain(1);
  LocalSgd strategy(*net, alone(), {.sync_every = 2});
  torch::optim::SGD optimizer(net->parameters(), 0.1), other(plain->parameters(), 0.1);
  for (int step = 0; step < 5; ++step) {
    step_alone(net, optimizer, 0, step);
    EXPECT_EQ(strategy.step(), step % 2 == 1);
    step_alone(plain, other, 0, step);
  }
  expect_equal(values_of(*net), values_of(*plain));
}

TEST(LocalSteps, RefusesWhatItCannotAverage) {
  Net net(1);
  const auto error = [&](const DiLoCoOptions& options) {
    return message_of<ConfigError>([&] { DiLoCo(*net, alone(), options); });
  };
  EXPECT_THAT(error({.sync_every = 0}), AllOf(HasSubstr("sync_every 0"), HasSubstr("hint:")));
  EXPECT_THAT(error({.outer_lr = 0}), HasSubstr("outer_lr 0"));
  EXPECT_THAT(error({.outer_momentum = 1}), HasSubstr("outer_momentum 1"));
  net->to(at::kDouble);
  EXPECT_THAT(error({}), HasSubstr("'first.weight' is Double"));
}

TEST(LocalSteps, ARankThatIsElsewhereIsACommError) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    LocalSgd strategy(*net, world, {.sync_every = 1});
    const auto before = values_of(*net);
    EXPECT_THAT(message_of<CommError>([&] {
                  if (world.rank() == 0) strategy.step();
                  world.group().barrier();
                }),
                HasSubstr("change of the parameters"));
    expect_equal(values_of(*net), before);
  });
}

}  // namespace
}  // namespace lockstep
