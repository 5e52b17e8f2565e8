// Shared weights on several nodes whose gradients travel in fewer bytes; and those of bf16 passes.
// Nodes that die meanwhile: elastic_nodes_test.cc. Convergence: recipes/slow_links_test.cc.
#include <ATen/ops/mse_loss.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>

#include "lockstep/parallel/replicas_test.h"
#include "lockstep/parallel/shared_weights.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using Tensors = std::vector<at::Tensor>;
constexpr int kVirtualRanks = 5;

struct WideImpl : torch::nn::Module {
  WideImpl() {
    first = register_module("first", torch::nn::Linear(130, 140));
    norm = register_module("norm", torch::nn::BatchNorm1d(140));
    second = register_module("second", torch::nn::Linear(140, 3));
    const at::NoGradGuard no_grad;
    for (auto& parameter : parameters()) parameter.copy_(numbers(parameter.sizes(), 5) * 0.1);
  }
  at::Tensor forward(const at::Tensor& x) { return second(at::tanh(norm(first(x)))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
};
TORCH_MODULE(Wide);

// Weights and buffers after some steps, the same on every rank.
Tensors train(const std::vector<int>& local_sizes, const SharedWeightsOptions& options) {
  Results results;
  Tensors of_rank_0;
  run_nodes(local_sizes, [&](const World& world) {
    Wide net;
    auto model = shared_weights(net, SGD{.lr = 0.1, .momentum = 0.9}, world, options);
    for (int step = 0; step < 6; ++step)
      model.step([&](int virtual_rank) -> VirtualLoss {
        if (step == 2 && virtual_rank == 3) return {};
        const at::Tensor x = numbers({6, 130}, 100 * step + virtual_rank);
        const at::Tensor loss = at::mse_loss(net->forward(x), x.slice(1, 0, 3), at::Reduction::Sum);
        if (step != 1) model.weights().last_backward(6.0);
        loss.backward();
        return {loss.item<double>(), 6.0};
      });
    Tensors values;
    for (const NamedTensor& one : model.weights().state()) values.push_back(one.tensor.clone());
    if (world.rank() == 0) of_rank_0 = values;
    world.group().barrier();
    results.put(world.rank(), std::move(values));
  });
  results.expect_all(std::accumulate(local_sizes.begin(), local_sizes.end(), 0), of_rank_0);
  return of_rank_0;
}

TEST(SharedWeightsWire, TheSameOnEveryNodeAndNearTheExact) {
  const Tensors exact = train({2}, {.virtual_ranks = kVirtualRanks});
  for (const auto& [format, tolerance] :
       {std::pair(WireFormat::bf16, 1e-3), std::pair(WireFormat::int8, 4e-3)}) {
    const SharedWeightsOptions options{.virtual_ranks = kVirtualRanks, .wire_format = format};
    expect_equal(train({2}, options), exact);  // within a node nothing is rounded
    for (const std::vector<int>& nodes : {std::vector{1, 1}, {2, 2}, {1, 3}, {1, 1, 2}}) {
      SCOPED_TRACE(testing::Message() << name_of(format) << ", " << nodes.size() << " nodes");
      const Tensors values = train(nodes, options);
      for (std::size_t i = 0; i < exact.size(); ++i)
        EXPECT_TRUE(at::allclose(values[i], exact[i], 0, tolerance))
            << "tensor " << i << ": " << (values[i] - exact[i]).abs().max().item<float>();
      EXPECT_FALSE(at::equal(values[0], exact[0])) << "nothing was rounded";
      expect_equal(train(nodes, options), values);
    }
  }
}

TEST(SharedWeightsWire, PassesInBf16GiveTheBitsOfOneNode) {
  const SharedWeightsOptions options{.virtual_ranks = kVirtualRanks, .precision = Precision::bf16};
  const Tensors expected = train({1}, options);
  EXPECT_FALSE(at::equal(expected[0], train({1}, {.virtual_ranks = kVirtualRanks})[0]));
  for (const std::vector<int>& nodes : {std::vector{1, 1}, {2, 1}, {2, 2}})
    expect_equal(train(nodes, options), expected);
}

// One parameter, the mean of whose gradient is given by hand.
struct OneImpl : torch::nn::Module {
  OneImpl() { weight = register_parameter("weight", at::zeros({3000})); }
  at::Tensor weight;
};
TORCH_MODULE(One);

// What is lost in one step goes with the next, as a part of the mean, whatever that step counts.
TEST(SharedWeightsWire, WhatIsLostIsSentLater) {
  run_nodes({1, 1}, [](const World& world) {
    One net;
    auto model = shared_weights(net, SGD{.lr = 1}, world, {.wire_format = WireFormat::int8});
    const at::Tensor gradient = numbers({3000}, 7);  // of magnitudes up to 1
    constexpr int kSteps = 40;
    for (int step = 0; step < kSteps; ++step) {
      net->weight.mutable_grad() = gradient * (1 + world.rank());
      model.set_weight(step % 2 == 0 ? 500 : 1);
      model.step();
    }
    // Of each node's values and of the sum half a 127th of the largest is still to come.
    const double lost = (net->weight.detach() + 1.5 * kSteps * gradient).abs().max().item<float>();
    EXPECT_LT(lost, 1.5 / 127 + 1e-3);
    EXPECT_GT(lost, 1e-4);
  });
}

// A sum that is finite, but not in the wire format; and a step that is given up.
TEST(SharedWeightsWire, AStepThatIsNotMadeLeavesNothing) {
  const auto values = [](bool tries) {
    Tensors result;
    run_nodes({1, 1}, [&](const World& world) {
      One net;
      auto model = shared_weights(net, SGD{.lr = 1}, world, {.wire_format = WireFormat::int8});
      for (int step = 0; step < 3; ++step) {
        if (tries && step == 0) {
          net->weight.mutable_grad() =
              at::full({3000}, world.rank() == 0 ? 2e38 : 0.1f) + numbers({3000}, 3);
          EXPECT_THAT(message_of<NonFiniteError>([&] { model.step(); }),
                      HasSubstr("step 1: the sum of all ranks' gradients and buffers is not"));
        }
        net->weight.mutable_grad() = numbers({3000}, 10 * step + world.rank());
        model.step();
      }
      if (world.rank() == 0) result = {net->weight.detach().clone()};
    });
    return result;
  };
  expect_equal(values(true), values(false));
}

}  // namespace
}  // namespace lockstep
