// Ranks are threads that share one segment, each with a module of its own.
#include "lockstep/parallel/data_parallel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/data/datasets/base.h>
#include <torch/data/datasets/map.h>
#include <torch/data/transforms/stack.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>

#include <mutex>
#include <set>

#include "lockstep/parallel/data_loader.h"
#include "lockstep/parallel/replicas_test.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// --- One process doing the same work, with the canonical tree by hand ---

using MakeOptimizer =
    std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<at::Tensor>)>;

std::vector<at::Tensor> train_alone(int ranks, int steps, const std::vector<double>& weights,
                                    const MakeOptimizer& make_optimizer) {
  Net net(1);
  const auto optimizer = make_optimizer(net->parameters());
  for (int step = 0; step < steps; ++step) {
    std::vector<std::vector<at::Tensor>> gradients(net->parameters().size());
    double total = 0;
    for (int rank = 0; rank < ranks; ++rank) {
      const double weight = weights[static_cast<std::size_t>(rank)];
      total += weight;
      net->zero_grad();
      loss_of(net->forward(inputs(rank, step)), step).backward();
      for (std::size_t i = 0; i < gradients.size(); ++i)
        gradients[i].push_back(net->parameters()[i].grad() * weight);
    }
    for (std::size_t i = 0; i < gradients.size(); ++i)
      net->parameters()[i].mutable_grad() = tree_sum(gradients[i]) / total;
    optimizer->step();
  }
  return values_of(*net);
}

class DataParallelBits : public testing::TestWithParam<int> {};

TEST_P(DataParallelBits, EqualOneProcess) {
  const int ranks = GetParam();
  const MakeOptimizer optimizers[] = {
      [](auto p) { return std::make_unique<torch::optim::Adam>(p, 0.01); },
      [](auto p) {
        return std::make_unique<torch::optim::SGD>(
            p, torch::optim::SGDOptions(0.05).momentum(0.9).nesterov(true));
      }};
  for (const DataParallelOptions& how : kWays)
    for (const std::vector<double>& weights :
         {std::vector<double>{1, 1, 1, 1}, std::vector<double>{3, 7, 2, 5}}) {
      if (ranks == 1 && weights[0] != 1) continue;  // alone, a weight changes nothing
      for (const MakeOptimizer& make_optimizer : optimizers) {
        Results results;
        run_ranks(ranks, [&](const World& world) {
          Net net(1 + world.rank());  // rank 0's values must reach all
          auto model = data_parallel(net, world, how);
          model.set_weight(weights[static_cast<std::size_t>(world.rank())]);
          const auto optimizer = make_optimizer(net->parameters());
          for (int step = 0; step < 4; ++step) {
            optimizer->zero_grad();
            loss_of(model->forward(inputs(world.rank(), step)), step).backward();
            optimizer->step();
          }
          results.put(world.rank(), values_of(*net));
        });
        results.expect_all(ranks, train_alone(ranks, 4, weights, make_optimizer));
      }
    }
}
INSTANTIATE_TEST_SUITE_P(Ranks, DataParallelBits, testing::Values(1, 2, 3, 4));

// --- Gradients: unused, accumulated, of other types ---

struct BranchesImpl : torch::nn::Module {
  BranchesImpl() {
    for (const char* name : {"all", "even", "none"}) register_parameter(name, at::ones({3}));
    wide = register_parameter("wide", at::ones({2, 3}, at::kDouble));
  }
  at::Tensor forward(bool even) {
    const auto p = named_parameters();
    const at::Tensor sum = (p["all"] * 2).sum() + wide.sum();
    return even ? sum + (p["even"] * 3).sum() : sum;
  }
  at::Tensor wide;
};

TEST(DataParallel, UnusedParametersContributeZeroOrStayUndefined) {
  run_ranks(3, [](const World& world) {
    const auto net = std::make_shared<BranchesImpl>();  // a shared_ptr serves as well as a holder
    auto model = data_parallel(net, world, {.find_unused_parameters = true});
    for (int step = 0; step < 2; ++step) {
      net->zero_grad();
      model(world.rank() % 2 == 0).backward();
      auto p = net->named_parameters();
      EXPECT_TRUE(at::equal(p["all"].grad(), at::full({3}, 2.0)));
      EXPECT_TRUE(at::equal(p["even"].grad(), at::full({3}, 2.0)));  // (3 + 0 + 3) / 3
      EXPECT_FALSE(p["none"].grad().defined());
      EXPECT_TRUE(at::equal(p["wide"].grad(), at::ones({2, 3}, at::kDouble)));
    }
  });
}

TEST(DataParallel, WeightZeroContributesNothing) {
  run_ranks(2, [](const World& world) {
    const auto net = std::make_shared<BranchesImpl>();
    auto model = data_parallel(net, world, {.find_unused_parameters = true});
    model.set_weight(world.rank() == 0 ? 0 : 5);
    (model->forward(true) / world.rank()).backward();  // infinite on rank 0
    EXPECT_TRUE(at::equal(net->named_parameters()["all"].grad(), at::full({3}, 2.0)));
    model.set_weight(0);
    EXPECT_THAT(message_of<ConfigError>([&] { model->forward(true).backward(); }),
                HasSubstr("the weight is 0 on every rank"));
    EXPECT_THAT(message_of<ConfigError>([&] { model.set_weight(-1); }), HasSubstr("weight -1"));
  });
}

TEST(DataParallel, ASecondBackwardAccumulates) {
  Results results;
  run_ranks(2, [&](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    // Resetting to zero in place keeps .grad in the group's memory; the result is the same.
    for (const bool set_to_none : {true, false, true}) {
      net->zero_grad(set_to_none);
      std::vector<at::Tensor> expected;
      for (int step = 0; step < 2; ++step) {
        Net plain(1);
        for (int rank = 0; rank < 2; ++rank)
          (loss_of(plain->forward(inputs(rank, step)), step) / 2).backward();
        for (std::size_t i = 0; i < plain->parameters().size(); ++i) {
          const at::Tensor gradient = plain->parameters()[i].grad();
          if (step == 0)
            expected.push_back(gradient);
          else
            expected[i] = expected[i] + gradient;
        }
        loss_of(model->forward(inputs(world.rank(), step)), step).backward();
        for (std::size_t i = 0; i < expected.size(); ++i)
          EXPECT_TRUE(at::allclose(net->parameters()[i].grad(), expected[i], 1e-5, 1e-7));
      }
      std::vector<at::Tensor> gradients;
      for (const auto& parameter : net->parameters()) gradients.push_back(parameter.grad().clone());
      results.put(world.rank(), gradients);
      world.group().barrier();
      if (world.rank() == 0) results.expect_all(2, gradients);
      world.group().barrier();
    }
  });
}

TEST(DataParallel, GradientsOutliveTheWorld) {
  Results results;
  run_ranks(2, [&](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    loss_of(model->forward(inputs(world.rank(), 0)), 0).backward();
    std::vector<at::Tensor> gradients;
    for (const auto& parameter : net->parameters()) gradients.push_back(parameter.grad());
    results.put(world.rank(), gradients);
  });
  Net plain(1);
  loss_of(plain->forward(inputs(0, 0)), 0).backward();
  std::vector<at::Tensor> first;
  for (const auto& parameter : plain->parameters()) first.push_back(parameter.grad().clone());
  plain->zero_grad();
  loss_of(plain->forward(inputs(1, 0)), 0).backward();
  std::vector<at::Tensor> expected;
  for (std::size_t i = 0; i < first.size(); ++i)
    expected.push_back((first[i] + plain->parameters()[i].grad()) / 2.0);
  results.expect_all(2, expected);
}

// --- Buffers ---

TEST(DataParallel, BuffersFollowRankZero) {
  Results results;
  run_ranks(2, [&](const World& world) {
    torch::nn::BatchNorm1d norm(7);
    norm->running_mean.fill_(world.rank());
    auto model = data_parallel(norm, world);
    EXPECT_EQ(norm->running_mean.sum().item<float>(), 0.0f);
    for (int step = 0; step < 3; ++step)
      model->forward(inputs(world.rank(), step)).square().sum().backward();
    std::vector<at::Tensor> buffers;
    for (const auto& buffer : norm->buffers()) buffers.push_back(buffer.clone());
    results.put(world.rank(), buffers);
  });
  torch::nn::BatchNorm1d plain(7);
  for (int step = 0; step < 3; ++step) plain->forward(inputs(0, step));
  results.expect_all(2, plain->buffers());
}

// --- What goes wrong ---

TEST(DataParallel, NamesTheTensorThatDiffers) {
  run_ranks(3, [](const World& world) {
    torch::nn::Linear layer(4, world.rank() == 2 ? 5 : 6);
    EXPECT_THAT(message_of<ConfigError>([&] { (void)data_parallel(layer, world); }),
                AllOf(HasSubstr("rank 0 has parameter 'weight' Float [6, 4]"),
                      HasSubstr("rank 2 has parameter 'weight' Float [5, 4]"), HasSubstr("hint:")));
    torch::nn::Linear bias(torch::nn::LinearOptions(4, 4).bias(world.rank() != 1));
    EXPECT_THAT(message_of<ConfigError>([&] { (void)data_parallel(bias, world); }),
                AllOf(HasSubstr("rank 0 has parameter 'bias'"), HasSubstr("nothing there")));
  });
}

TEST(DataParallel, ARankThatStaysAwayIsACommErrorOfBackward) {
  run_ranks(
      2,
      [](const World& world) {
        Net net(1);
        auto model = data_parallel(net, world);
        if (world.rank() == 1) return;
        EXPECT_THAT(
            message_of<CommError>([&] { loss_of(model->forward(inputs(0, 0)), 0).backward(); }),
            HasSubstr("rank 1"));
      },
      std::chrono::milliseconds(1500));
}

TEST(DataParallel, RefusesAGradientItWouldNotAverage) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    net->first->bias.set_requires_grad(false);
    auto model = data_parallel(net, world);
    loss_of(model->forward(inputs(world.rank(), 0)), 0).backward();
    net->first->bias.set_requires_grad(true);
    EXPECT_THAT(message_of<ConfigError>(
                    [&] { loss_of(model->forward(inputs(world.rank(), 0)), 0).backward(); }),
                HasSubstr("'first.bias'"));
  });
}

TEST(DataParallel, RefusesToCutAGraph) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    EXPECT_THAT(message_of<ConfigError>([&] {
                  loss_of(model->forward(inputs(world.rank(), 0)), 0)
                      .backward({}, /*retain_graph=*/true, /*create_graph=*/world.rank() == 1);
                }),
                AllOf(HasSubstr("'first.weight' on rank 1"), HasSubstr("create_graph")));
    net->zero_grad();  // the graph and the gradients hold each other
  });
}

TEST(DataParallel, EndsWithItsObjectAndWrapsOnce) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    {
      auto model = data_parallel(net, world);
      EXPECT_THAT(message_of<ConfigError>([&] { (void)data_parallel(net, world); }),
                  HasSubstr("'first.weight'"));
    }
    // No collective any more: rank 1 does not take part.
    if (world.rank() == 0) loss_of(net->forward(inputs(0, 0)), 0).backward();
    auto model = data_parallel(net, world);
    loss_of(model->forward(inputs(world.rank(), 0)), 0).backward();
  });
}

TEST(DataParallel, AloneChangesNothing) {
  Net wrapped(1), plain(1);
  auto model = data_parallel(wrapped, alone());
  model.set_weight(3);
  loss_of(model->forward(inputs(0, 0)), 0).backward();
  loss_of(plain->forward(inputs(0, 0)), 0).backward();
  for (std::size_t i = 0; i < plain->parameters().size(); ++i)
    EXPECT_TRUE(at::equal(wrapped->parameters()[i].grad(), plain->parameters()[i].grad()));
}

// --- With the loader: the README's loop ---

struct Rows : torch::data::datasets::Dataset<Rows> {
  torch::data::Example<> get(std::size_t index) override {
    const auto row = static_cast<int>(index);
    return {numbers({7}, row), at::full({}, row)};
  }
  std::optional<std::size_t> size() const override { return 23; }
};

TEST(DataLoader, EverySampleOnceOverAllRanks) {
  std::mutex mutex;
  std::vector<std::multiset<int>> seen(2);
  run_ranks(3, [&](const World& world) {
    auto loader = make_data_loader(Rows().map(torch::data::transforms::Stack<>()), world,
                                   {.batch_size = 3, .seed = 4});
    EXPECT_EQ(loader->size(), 3u);  // 9, 9 and 5
    for (std::size_t epoch = 0; epoch < 2; ++epoch) {
      loader->set_epoch(epoch);
      std::uint64_t batches = 0;
      for (auto& batch : *loader) {
        ++batches;
        EXPECT_EQ(batch.data.size(0), batch.target.size(0));
        const std::lock_guard lock(mutex);
        for (std::int64_t i = 0; i < batch.target.size(0); ++i) {
          const int row = batch.target[i].item<int>();
          EXPECT_TRUE(at::equal(batch.data[i], numbers({7}, row)));
          seen[epoch].insert(row);
        }
      }
      EXPECT_EQ(batches, loader->size());
    }
  });
  for (const auto& epoch : seen) {
    EXPECT_EQ(epoch.size(), 23u);
    EXPECT_EQ(std::set<int>(epoch.begin(), epoch.end()).size(), 23u);
  }
}

}  // namespace
}  // namespace lockstep
