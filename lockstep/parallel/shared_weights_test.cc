// Ranks are threads that share one segment, each with a module of its own.
#include "lockstep/parallel/shared_weights.h"

#include <ATen/ops/mse_loss.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>

#include <functional>
#include <limits>

#include "lockstep/parallel/replicas_test.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

// Wide enough that a gradient is written straight into its place.
struct WideNetImpl : torch::nn::Module {
  explicit WideNetImpl(int seed) {
    first = register_module("first", torch::nn::Linear(130, 140));
    norm = register_module("norm", torch::nn::BatchNorm1d(140));
    second = register_module("second", torch::nn::Linear(140, 3));
    const at::NoGradGuard no_grad;
    for (auto& parameter : parameters()) parameter.copy_(numbers(parameter.sizes(), seed) * 0.1);
  }
  at::Tensor forward(const at::Tensor& x) { return second(at::tanh(norm(first(x)))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
};
TORCH_MODULE(WideNet);

constexpr int kVirtualRanks = 4, kSteps = 5;

at::Tensor loss_of(WideNet& net, int step, int virtual_rank) {
  const at::Tensor input = numbers({6, 130}, 100 * step + virtual_rank);
  const at::Tensor target = numbers({6, 3}, 1000 + 100 * step + virtual_rank);
  return at::mse_loss(net->forward(input), target, at::Reduction::Sum);
}

// Everything that training has made of `net` after some steps.
std::vector<at::Tensor> values_after(const World& world, const std::vector<ParameterGroup>& groups,
                                     WideNet& net, double clip_grad_norm, int skipped_rank = -1) {
  SharedWeights weights(*net, world, groups,
                        {.virtual_ranks = kVirtualRanks, .clip_grad_norm = clip_grad_norm});
  for (int step = 0; step < kSteps; ++step) {
    weights.compute([&](int virtual_rank) -> VirtualLoss {
      if (step == 2 && virtual_rank == skipped_rank) return {};
      const at::Tensor loss = loss_of(net, step, virtual_rank);
      if (step != 1) weights.last_backward(6.0);
      loss.backward();
      return {loss.item<double>(), 6.0};
    });
    EXPECT_EQ(weights.decide(step % 2 == 0).step, static_cast<std::uint64_t>(step + 1));
    weights.update();
  }
  std::vector<at::Tensor> values;
  for (const NamedTensor& one : weights.state()) values.push_back(one.tensor.clone());
  for (const StateTensor& one : weights.state_tensors())
    values.push_back(
        at::from_blob(one.bytes.data(), {static_cast<std::int64_t>(one.bytes.size())}, at::kByte)
            .clone());
  return values;
}

std::vector<ParameterGroup> groups_of(WideNet& net, const OptimizerOptions& optimizer) {
  OptimizerOptions other = optimizer;
  other.lr *= 3;
  return {{net->first->parameters(), optimizer},
          {{net->norm->weight, net->norm->bias, net->second->weight, net->second->bias}, other}};
}

void expect_the_same_bits(const std::vector<std::vector<int>>& worlds) {
  const OptimizerOptions optimizers[] = {
      Adam{.lr = 1e-2}, SGD{.lr = 1e-2, .momentum = 0.9, .nesterov = true},
      AdamW{.lr = 1e-2, .weight_decay = 0.1},
      RMSprop{.lr = 1e-3, .momentum = 0.5, .centered = true}, Adagrad{.lr = 1e-2}};
  for (std::size_t i = 0; i < std::size(optimizers); ++i) {
    const double clip = i % 2 == 0 ? 0.5 : 0;
    const int skipped = i % 2 == 0 ? kVirtualRanks - 1 : -1;
    std::vector<at::Tensor> expected;
    const auto train = [&](const World& world) {
      WideNet net(world.rank());  // rank 0's values count
      return values_after(world, groups_of(net, optimizers[i]), net, clip, skipped);
    };
    run_ranks(1, [&](const World& world) { expected = train(world); });
    for (const std::vector<int>& local_sizes : worlds)
      run_nodes(local_sizes, [&](const World& world) {
        const auto values = train(world);
        ASSERT_EQ(values.size(), expected.size());
        for (std::size_t v = 0; v < values.size(); ++v)
          EXPECT_TRUE(at::equal(values[v], expected[v]))
              << "optimizer " << i << ", rank " << world.rank() << " of " << world.size()
              << " on node " << world.node() << " of " << local_sizes.size() << ", value " << v;
      });
  }
}

TEST(SharedWeights, TheSameBitsOnAnyNumberOfRanks) { expect_the_same_bits({{2}, {3}, {4}}); }

TEST(SharedWeights, TheSameBitsOnAnyNumberOfNodes) {
  expect_the_same_bits({{1, 1}, {2, 2}, {3, 1}, {1, 2}, {1, 2, 1}, {1, 1, 1, 1}});
}

// What a user writes, against one process with torch::optim and the whole batch.
TEST(SharedWeights, TrainAsOneProcessDoes) {
  WideNet alone(0);
  torch::optim::Adam optimizer(alone->parameters(), torch::optim::AdamOptions(1e-2));
  alone->eval();  // batch statistics of halves are not those of the whole
  for (int step = 0; step < kSteps; ++step) {
    optimizer.zero_grad();
    ((loss_of(alone, step, 0) + loss_of(alone, step, 1)) / 2).backward();
    optimizer.step();
  }
  run_ranks(2, [&](const World& world) {
    WideNet net(world.rank());
    auto model = shared_weights(net, Adam{.lr = 1e-2}, world);
    net->eval();
    for (int step = 0; step < kSteps; ++step) {
      loss_of(net, step, world.rank()).backward();
      EXPECT_EQ(model.step().step, static_cast<std::uint64_t>(step + 1));
      for (const auto& parameter : net->parameters()) EXPECT_FALSE(parameter.grad().defined());
    }
    const auto parameters = net->parameters(), expected = alone->parameters();
    for (std::size_t i = 0; i < parameters.size(); ++i)
      EXPECT_TRUE(at::allclose(parameters[i], expected[i], 1e-4, 1e-5)) << i;
  });
}

TEST(SharedWeights, AWeightSaysWhatARankCountsFor) {
  run_ranks(2, [&](const World& world) {
    torch::nn::Linear linear(1, 1);
    auto model = shared_weights(linear, SGD{.lr = 1}, world);
    edit_weights(model, [&] {
      linear->weight.zero_();
      linear->bias.zero_();
    });
    model.set_weight(world.rank() == 0 ? 1 : 3);
    (model(at::full({1, 1}, world.rank() == 0 ? 4.0 : 8.0))).sum().backward();
    model.step();
    EXPECT_EQ(linear->weight.item<float>(), -(1 * 4.0f + 3 * 8.0f) / 4);
    EXPECT_EQ(linear->bias.item<float>(), -1.0f);
  });
}

TEST(SharedWeights, AccumulateOverBackwards) {
  run_ranks(2, [&](const World& world) {
    WideNet net(0), twice(0);
    auto model = shared_weights(net, SGD{.lr = 0.1}, world);
    torch::optim::SGD optimizer(twice->parameters(), torch::optim::SGDOptions(0.1));
    for (WideNet& one : {std::ref(net), std::ref(twice)}) {
      one->eval();
      loss_of(one, 0, 0).backward();
      loss_of(one, 1, 0).backward();
    }
    model.step();
    optimizer.step();
    EXPECT_TRUE(at::allclose(net->first->weight, twice->first->weight, 1e-5, 1e-6));
  });
}

TEST(SharedWeights, OneCopyWhateverTheNumberOfRanks) {
  for (const int size : {1, 2, 4})
    run_ranks(size, [&](const World& world) {
      WideNet net(0);
      const SharedWeights weights(*net, world, Adam{});
      const std::size_t count = weights.parameter_count();
      EXPECT_GT(weights.shared_bytes(), 3 * count * sizeof(float));
      EXPECT_LT(weights.shared_bytes(), 3 * count * sizeof(float) + (400 << 10));
    });
}

TEST(SharedWeights, WhatIsNotFiniteChangesNothing) {
  run_ranks(2, [&](const World& world) {
    WideNet net(0);
    SharedWeights weights(*net, world, Adam{});
    const at::Tensor before = net->first->weight.clone();
    const auto step = [&](float factor) {
      weights.compute([&](int virtual_rank) -> VirtualLoss {
        (loss_of(net, 0, virtual_rank) * (virtual_rank == 1 ? factor : 1)).backward();
        return {1.0, 6.0};
      });
      weights.decide();
      weights.update();
    };
    const std::string error =
        message_of<NonFiniteError>([&] { step(std::numeric_limits<float>::infinity()); });
    EXPECT_EQ(error, "step 1: the gradient or a buffer of rank 1 is not finite");
    EXPECT_TRUE(at::equal(before, net->first->weight));
    step(1);
    EXPECT_FALSE(at::equal(before, net->first->weight));
    EXPECT_TRUE(weights.is_finite());
  });
}

TEST(SharedWeights, RanksWithOtherLearningRatesAreTold) {
  run_ranks(2, [&](const World& world) {
    torch::nn::Linear linear(1, 1);
    auto model = shared_weights(linear, SGD{.lr = 1}, world);
    model.groups()[0].lr = world.rank() == 0 ? 1 : 2;
    EXPECT_THAT(message_of<Error>([&] { model.step(); }),
                HasSubstr("step 1: rank 1 has other learning rates"));
  });
}

TEST(SharedWeights, RefusalsNameTheParameter) {
  const World world = init_from({}, {});
  WideNet net(0);
  EXPECT_THAT(
      message_of<ConfigError>([&] {
        SharedWeights(*net, world, std::vector<ParameterGroup>{{net->first->parameters(), Adam{}}});
      }),
      HasSubstr("parameter 'norm.weight' is in no group"));
  EXPECT_THAT(message_of<ConfigError>([&] {
                SharedWeights(*net, world,
                              std::vector<ParameterGroup>{{net->parameters(), Adam{}},
                                                          {{net->second->bias}, Adam{}}});
              }),
              HasSubstr("parameter 'second.bias' is in 2 groups"));
  net->first->weight.set_data(net->first->weight.to(at::kDouble));
  EXPECT_THAT(message_of<ConfigError>([&] { SharedWeights(*net, world, Adam{}); }),
              HasSubstr("'first.weight' is Double"));
  EXPECT_THAT(message_of<ConfigError>([&] {
                torch::nn::Linear linear(1, 1);
                SharedWeights(*linear, world, Adam{.lr = -1});
              }),
              HasSubstr("lr"));
}

TEST(SharedWeights, FrozenParametersAreSharedAndStay) {
  run_ranks(2, [&](const World& world) {
    WideNet net(world.rank());
    net->first->weight.requires_grad_(false);
    auto model = shared_weights(net, Adam{}, world);
    EXPECT_TRUE(at::equal(net->first->weight, WideNet(0)->first->weight));
    loss_of(net, 0, world.rank()).backward();
    model.step();
    EXPECT_TRUE(at::equal(net->first->weight, WideNet(0)->first->weight));
    EXPECT_FALSE(at::equal(net->second->weight, WideNet(0)->second->weight));
  });
}

TEST(SharedWeights, GoOnFromARestoredState) {
  run_ranks(2, [&](const World& world) {
    const auto steps = [&](SharedWeights& weights, WideNet& net, int first, int last) {
      for (int step = first; step < last; ++step) {
        weights.compute([&](int virtual_rank) -> VirtualLoss {
          const at::Tensor loss = loss_of(net, step, virtual_rank);
          loss.backward();
          return {loss.item<double>(), 6.0};
        });
        weights.decide();
        weights.update();
      }
    };
    WideNet unbroken(0), first(0), second(5);
    SharedWeights whole(*unbroken, world, Adam{});
    steps(whole, unbroken, 0, 4);
    SharedWeights before(*first, world, Adam{});
    steps(before, first, 0, 2);
    const auto saved = before.state_tensors();
    const InitialState initial{.step = 2,
                               .group_steps = before.group_steps(),
                               .fill = [&](std::span<const StateTensor> tensors,
                                           std::span<std::byte> note, std::span<std::byte> log) {
                                 EXPECT_EQ(note.size(), 8u);
                                 EXPECT_EQ(log.size(), 100u);
                                 ASSERT_EQ(tensors.size(), saved.size());
                                 for (std::size_t i = 0; i < tensors.size(); ++i) {
                                   EXPECT_EQ(tensors[i].name, saved[i].name);
                                   std::ranges::copy(saved[i].bytes, tensors[i].bytes.begin());
                                 }
                               }};
    SharedWeights after(*second, world, Adam{}, {.note_bytes = 8, .log_bytes = 100}, &initial);
    steps(after, second, 2, 4);
    EXPECT_EQ(after.committed_step(), 4u);
    for (std::size_t i = 0; i < whole.state().size(); ++i)
      EXPECT_TRUE(at::equal(whole.state()[i].tensor, after.state()[i].tensor))
          << whole.state()[i].name;
  });
}

TEST(SharedWeightsDeath, AStrayWriteIsNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      {
        WideNet net(0);
        const SharedWeights weights(*net, init_from({}, {}), Adam{});
        const at::NoGradGuard no_grad;
        net->second->weight.fill_(1);
      },
      "rank 0: shared weights: parameter 'second.weight' was written to");
}

TEST(SharedWeights, TheModuleGoesOnAlone) {
  WideNet net(0);
  { const SharedWeights weights(*net, init_from({}, {}), Adam{}); }
  const at::NoGradGuard no_grad;
  net->second->weight.fill_(1);
  EXPECT_EQ(net->second->weight.sum().item<float>(), 3 * 140);
}

}  // namespace
}  // namespace lockstep
