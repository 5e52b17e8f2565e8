// What a backward may do beside the plain step: accumulate, leave out, keep, repeat, differ.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/functional/linear.h>

#include "lockstep/bridge/autocast.h"
#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/replicas_test.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

std::vector<at::Tensor> gradients_of(torch::nn::Module& module) {
  std::vector<at::Tensor> gradients;
  for (const auto& parameter : module.parameters()) gradients.push_back(parameter.grad().clone());
  return gradients;
}

// The average over ranks of what `local` leaves in the gradients of a module of one process.
template <typename Module>
std::vector<at::Tensor> average(int ranks, const std::function<void(Module&, int rank)>& local) {
  std::vector<std::vector<at::Tensor>> parts;
  for (int rank = 0; rank < ranks; ++rank) {
    Module module(1);
    local(module, rank);
    const std::vector<at::Tensor> gradients = gradients_of(*module);
    parts.resize(gradients.size());
    for (std::size_t i = 0; i < gradients.size(); ++i) parts[i].push_back(gradients[i]);
  }
  std::vector<at::Tensor> averages;
  for (const auto& one : parts) averages.push_back(tree_sum(one) / ranks);
  return averages;
}

// --- Buckets ---

TEST(Buckets, AreReducedWhileBackwardRuns) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world, kWays[1]);
    std::uint64_t before = world.group().statistics().operations, during = 0;
    net->first->weight.register_hook([&](const at::Tensor&) {
      during = world.group().statistics().operations;
      return at::Tensor();
    });
    loss_of(model->forward(inputs(world.rank(), 0)), 0).backward();
    EXPECT_GT(during, before);
    EXPECT_LT(during, world.group().statistics().operations);
  });
}

TEST(Buckets, HoldTheGradientsFromTheMomentTheyCome) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    const auto in_arena = [&](const at::Tensor& parameter) {
      return parameter.grad().defined() &&
             world.segment()->arena_owner(parameter.grad().data_ptr()) == world.rank();
    };
    bool early = false;
    net->first->weight.register_hook([&](const at::Tensor&) {
      early = in_arena(net->second->weight) && in_arena(net->second->bias);
      return at::Tensor();
    });
    loss_of(model->forward(inputs(world.rank(), 0)), 0).backward();
    EXPECT_TRUE(early);
    for (const at::Tensor& parameter : net->parameters()) EXPECT_TRUE(in_arena(parameter));
  });
}

struct PairImpl : torch::nn::Module {
  explicit PairImpl(int) {
    left = register_parameter("left", numbers({40}, 1));
    right = register_parameter("right", numbers({40}, 2));
  }
  at::Tensor left, right;
};
TORCH_MODULE(Pair);

TEST(Buckets, KeepTheirOrderWhateverOrderGradientsComeIn) {
  for (const DataParallelOptions& how : kWays) {
    Results results;
    const auto backward = [](Pair& pair, int rank) {
      const at::Tensor x = numbers({40}, 3 + rank);
      const auto term = [&](const at::Tensor& p) { return (p * x).square().sum(); };
      const at::Tensor one = rank == 0 ? term(pair->left) : term(pair->right);
      (one + (rank == 0 ? term(pair->right) : term(pair->left))).backward();
    };
    run_ranks(2, [&](const World& world) {
      Pair pair(1);
      auto model = data_parallel(pair, world, how);
      backward(pair, world.rank());
      results.put(world.rank(), gradients_of(*pair));
    });
    results.expect_all(2, average<Pair>(2, backward));
  }
}

TEST(Buckets, RefuseASizeOutOfRange) {
  EXPECT_THAT(
      message_of<ConfigError>([] { (void)data_parallel(Net(1), alone(), {.bucket_cap_mb = -1}); }),
      HasSubstr("bucket_cap_mb -1"));
}

// --- Accumulation ---

TEST(NoSync, AccumulatesLocallyAndThenAverages) {
  for (const DataParallelOptions& how : kWays) {
    Results results;
    run_ranks(3, [&](const World& world) {
      Net net(1);
      auto model = data_parallel(net, world, how);
      for (int round = 0; round < 2; ++round) {
        net->zero_grad();
        const std::uint64_t before = world.group().statistics().operations;
        {
          const auto local = model.no_sync();
          const auto nested = model.no_sync();
          for (int step = 0; step < 2; ++step)
            loss_of(model->forward(inputs(world.rank(), step)), step).backward();
        }
        EXPECT_EQ(world.group().statistics().operations, before);
        loss_of(model->forward(inputs(world.rank(), 2)), 2).backward();
        results.put(world.rank(), gradients_of(*net));
      }
    });
    results.expect_all(3, average<Net>(3, [](Net& net, int rank) {
                         for (int step = 0; step < 3; ++step)
                           loss_of(net->forward(inputs(rank, step)), step).backward();
                       }));
  }
}

TEST(NoSync, WhatOnlyTheLocalPartUsedCounts) {
  run_ranks(2, [](const World& world) {
    Pair pair(1);
    auto model = data_parallel(pair, world);
    {
      const auto local = model.no_sync();
      (pair->left * (1 + world.rank())).sum().backward();
    }
    pair->right.sum().backward();
    EXPECT_TRUE(at::equal(pair->left.grad(), at::full({40}, 1.5)));
    EXPECT_TRUE(at::equal(pair->right.grad(), at::ones({40})));
  });
}

TEST(SecondBackward, WithRetainGraphAddsTheSame) {
  Results results;
  const auto backward = [](const at::Tensor& loss) {
    loss.backward({}, /*retain_graph=*/true);
    loss.backward();
  };
  run_ranks(2, [&](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    backward(loss_of(model->forward(inputs(world.rank(), 0)), 0));
    results.put(world.rank(), gradients_of(*net));
    for (const at::Tensor& one : gradients_of(*net)) EXPECT_GT(one.abs().sum().item<float>(), 0);
  });
  // (g0 + g1) / 2 comes first, and each rank adds its own to that.
  std::vector<at::Tensor> first = average<Net>(
      2, [](Net& net, int rank) { loss_of(net->forward(inputs(rank, 0)), 0).backward(); });
  results.expect_all(2, average<Net>(2, [&](Net& net, int rank) {
                       loss_of(net->forward(inputs(rank, 0)), 0).backward();
                       for (std::size_t i = 0; i < first.size(); ++i)
                         net->parameters()[i].mutable_grad() =
                             first[i] + net->parameters()[i].grad();
                     }));
}

// --- Unused and tied parameters ---

TEST(Unused, AreAnErrorThatNamesThemOnEveryRank) {
  for (const DataParallelOptions& how : kWays)
    run_ranks(3, [&](const World& world) {
      Pair pair(1);
      auto model = data_parallel(pair, world, how);
      EXPECT_THAT(message_of<ConfigError>([&] {
                    if (world.rank() == 1)
                      pair->right.sum().backward();
                    else
                      (pair->left + pair->right).sum().backward();
                  }),
                  AllOf(HasSubstr("'left' on rank 1"), Not(HasSubstr("'right'")),
                        HasSubstr("find_unused_parameters")));
      pair->zero_grad();
      EXPECT_THAT(message_of<ConfigError>([&] { pair->left.sum().backward(); }),
                  HasSubstr("'right' on every rank"));
      pair->zero_grad();
      (pair->left + pair->right).sum().backward();
      EXPECT_TRUE(at::equal(pair->left.grad(), at::ones({40})));
    });
}

TEST(Unused, KeepTheGradientTheyHad) {
  for (DataParallelOptions how : kWays) {
    how.find_unused_parameters = true;
    run_ranks(3, [&](const World& world) {
      Pair pair(1);
      auto model = data_parallel(pair, world, how);
      (pair->left * numbers({40}, world.rank())).sum().backward();
      EXPECT_FALSE(pair->right.grad().defined());
      const at::Tensor left = pair->left.grad().clone();
      model.set_weight(1 + world.rank());
      (pair->right * 7).sum().backward();
      EXPECT_TRUE(at::equal(pair->left.grad(), left));
      EXPECT_TRUE(at::equal(pair->right.grad(), at::full({40}, 7.0)));
    });
  }
}

// A weight used twice under two names, large enough to be born in place.
struct TiedImpl : torch::nn::Module {
  explicit TiedImpl(int seed) {
    weight = register_parameter("encoder", numbers({130, 130}, seed) * 0.1);
    register_parameter("decoder", weight);
    bias = register_parameter("bias", at::zeros({130}));
  }
  at::Tensor forward(const at::Tensor& x) {
    using torch::nn::functional::linear;
    return linear(at::tanh(linear(x, weight, bias)), weight, bias);
  }
  at::Tensor weight, bias;
};
TORCH_MODULE(Tied);

TEST(Tied, AreAveragedOnce) {
  for (const DataParallelOptions& how : kWays) {
    Results results;
    const auto local = [](Tied& tied, int rank) {
      tied->forward(numbers({5, 130}, rank)).square().mean().backward();
    };
    run_ranks(2, [&](const World& world) {
      Tied tied(1);
      auto model = data_parallel(tied, world, how);
      for (int round = 0; round < 3; ++round) {
        tied->zero_grad(/*set_to_none=*/round != 1);
        local(tied, world.rank());
        results.put(world.rank(), gradients_of(*tied));
      }
    });
    results.expect_all(2, average<Tied>(2, local));
  }
}

// --- Gradients that somebody keeps ---

TEST(Kept, GradientsKeepTheirValues) {
  run_ranks(2, [](const World& world) {
    Pair pair(1);
    auto model = data_parallel(pair, world);
    ((pair->left + pair->right) * (1 + world.rank())).sum().backward();
    const at::Tensor kept = pair->left.grad();
    at::Tensor local;
    pair->left.register_hook([&](const at::Tensor& gradient) { local = gradient; });
    pair->zero_grad();
    ((pair->left + pair->right) * (3 + world.rank())).sum().backward();
    EXPECT_TRUE(at::equal(kept, at::full({40}, 1.5)));
    EXPECT_TRUE(at::equal(pair->left.grad(), at::full({40}, 3.5)));
    EXPECT_TRUE(at::equal(local, at::full({40}, 3.0 + world.rank())));
  });
}

TEST(Kept, GradientsOfTheUsersOwnMemoryStayThere) {
  run_ranks(2, [](const World& world) {
    Pair pair(1);
    auto model = data_parallel(pair, world);
    const at::Tensor flat = at::zeros({80});
    pair->left.mutable_grad() = flat.narrow(0, 0, 40);
    pair->right.mutable_grad() = flat.narrow(0, 40, 40);
    for (int round = 0; round < 2; ++round) {
      flat.zero_();
      (pair->left * (1 + world.rank()) + pair->right).sum().backward();
      EXPECT_TRUE(at::equal(flat, at::cat({at::full({40}, 1.5), at::ones({40})})));
      EXPECT_EQ(pair->right.grad().data_ptr(), flat.narrow(0, 40, 40).data_ptr());
    }
  });
}

// --- Mixed precision ---

struct WideImpl : torch::nn::Module {
  explicit WideImpl(int seed) {
    layer = register_module("layer", torch::nn::Linear(130, 130));
    const at::NoGradGuard no_grad;
    for (auto& parameter : parameters()) parameter.copy_(numbers(parameter.sizes(), seed) * 0.1);
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor y = layer(x);
    type = y.scalar_type();
    return y;
  }
  torch::nn::Linear layer{nullptr};
  at::ScalarType type = at::kFloat;
};
TORCH_MODULE(Wide);

TEST(Precision, Bf16ForwardFp32Gradients) {
  for (const Precision precision : {Precision::bf16, Precision::fp32}) {
    Results results;
    const at::ScalarType type = precision == Precision::bf16 ? at::kBFloat16 : at::kFloat;
    for (const bool by_arrow : {true, false}) {
      run_ranks(2, [&](const World& world) {
        Wide net(1);
        auto model = data_parallel(net, world, {.precision = precision});
        for (int step = 0; step < 2; ++step) {
          net->zero_grad();
          const at::Tensor x = numbers({5, 130}, world.rank());
          const at::Tensor y = by_arrow ? model->forward(x) : model(x);
          EXPECT_EQ(net->type, type);
          y.to(at::kFloat).square().mean().backward();
          for (const auto& p : net->parameters()) EXPECT_EQ(p.grad().scalar_type(), at::kFloat);
        }
        results.put(world.rank(), gradients_of(*net));
      });
      results.expect_all(2, average<Wide>(2, [&](Wide& net, int rank) {
                           at::Tensor y;
                           {
                             const Autocast autocast(precision);
                             y = net->forward(numbers({5, 130}, rank));
                           }
                           y.to(at::kFloat).square().mean().backward();
                         }));
    }
  }
}

}  // namespace
}  // namespace lockstep
