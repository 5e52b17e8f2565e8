// Ranks with unequal numbers of batches.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/optim/sgd.h>

#include <algorithm>

#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/replicas_test.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;

using Lengths = std::vector<int>;

std::unique_ptr<torch::optim::SGD> make_sgd(Net& net, double momentum) {
  return std::make_unique<torch::optim::SGD>(net->parameters(),
                                             torch::optim::SGDOptions(0.1).momentum(momentum));
}

// One process doing the same work: who is out counts zero.
std::vector<at::Tensor> train_alone(const Lengths& lengths, bool by_initial_size, double momentum) {
  Net net(1);
  const auto optimizer = make_sgd(net, momentum);
  for (int step = 0; step < *std::max_element(lengths.begin(), lengths.end()); ++step) {
    std::vector<std::vector<at::Tensor>> parts(net->parameters().size());
    int active = 0;
    for (std::size_t rank = 0; rank < lengths.size(); ++rank) {
      net->zero_grad();
      loss_of(net->forward(inputs(static_cast<int>(rank), step)), step).backward();
      const bool out = step >= lengths[rank];
      active += !out;
      for (std::size_t i = 0; i < parts.size(); ++i) {
        const at::Tensor gradient = net->parameters()[i].grad();
        parts[i].push_back(out ? at::zeros_like(gradient) : gradient);
      }
    }
    const auto divisor = static_cast<double>(by_initial_size ? lengths.size() : active);
    for (std::size_t i = 0; i < parts.size(); ++i)
      net->parameters()[i].mutable_grad() = tree_sum(parts[i]) / divisor;
    optimizer->step();
  }
  return values_of(*net);
}

void train(const Lengths& lengths, const DataParallelOptions& options, const JoinOptions& how,
           double momentum, const std::vector<at::Tensor>& expected) {
  Results results;
  const int ranks = static_cast<int>(lengths.size());
  run_ranks(ranks, [&](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world, options);
    const auto optimizer = make_sgd(net, momentum);
    JoinOptions mine = how;
    if (momentum > 0) mine.after_shadow_backward = [&] { optimizer->step(); };
    {
      const auto join = model.join(mine);
      for (int step = 0; step < lengths[static_cast<std::size_t>(world.rank())]; ++step) {
        optimizer->zero_grad();
        loss_of(model->forward(inputs(world.rank(), step)), step).backward();
        optimizer->step();
      }
    }
    results.put(world.rank(), values_of(*net));
    // Afterwards everything is as before, the optimizer's state included where it stepped along.
    if (momentum == 0 || lengths == Lengths{0, 0}) return;
    for (const at::Tensor& parameter : net->parameters()) {
      const auto state = optimizer->state().find(parameter.unsafeGetTensorImpl());
      ASSERT_NE(state, optimizer->state().end());
      at::Tensor all = at::zeros({world.size()}, at::kDouble);
      const double sum = static_cast<torch::optim::SGDParamState&>(*state->second)
                             .momentum_buffer()
                             .sum()
                             .item<double>();
      world.group().all_gather(std::as_bytes(std::span(&sum, 1)),
                               {reinterpret_cast<std::byte*>(all.data_ptr()), all.nbytes()},
                               Dtype::float64);
      EXPECT_TRUE(at::equal(all, at::full_like(all, sum)));
    }
  });
  results.expect_all(ranks, expected);
}

TEST(Join, EqualsOneProcess) {
  for (const Lengths& lengths :
       {Lengths{3}, Lengths{4, 1}, Lengths{0, 2}, Lengths{2, 2}, Lengths{1, 0, 3}, Lengths{0, 0}})
    for (const bool by_initial_size : {true, false})
      for (const double momentum : {0.0, 0.9})
        for (const DataParallelOptions& options : kWays) {
          SCOPED_TRACE(testing::Message()
                       << testing::PrintToString(lengths) << by_initial_size << momentum
                       << options.bucket_cap_mb.has_value() << options.overlap.has_value());
          train(lengths, options, {.divide_by_initial_world_size = by_initial_size}, momentum,
                train_alone(lengths, by_initial_size, momentum));
        }
}

TEST(Join, BuffersAreThoseOfARankThatWasAmongTheLast) {
  Results results;
  run_ranks(3, [&](const World& world) {
    torch::nn::BatchNorm1d norm(7);
    auto model = data_parallel(norm, world);
    {
      const auto join = model.join();
      for (int step = 0; step < 1 + 2 * (world.rank() == 1); ++step)
        model->forward(inputs(world.rank(), step)).square().sum().backward();
    }
    std::vector<at::Tensor> buffers;
    for (const auto& buffer : norm->buffers()) buffers.push_back(buffer.clone());
    results.put(world.rank(), buffers);
  });
  torch::nn::BatchNorm1d plain(7);
  plain->forward(inputs(0, 0));
  for (int step = 1; step < 3; ++step) plain->forward(inputs(1, step));
  results.expect_all(3, plain->buffers());
}

TEST(Join, EarlyTerminationIsAnErrorOfAllRanks) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    EXPECT_THAT(message_of<Error>([&] {
                  const auto join = model.join({.throw_on_early_termination = true});
                  for (int step = 0; step < 1 + world.rank(); ++step)
                    loss_of(model->forward(inputs(world.rank(), step)), step).backward();
                }),
                HasSubstr("ran out of batches"));
    auto join = model.join({.throw_on_early_termination = true});  // and the next one is fine
    loss_of(model->forward(inputs(world.rank(), 0)), 0).backward();
    join.finish();
    join.finish();
  });
}

TEST(Join, NamesGradientsThatWouldBeLost) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    EXPECT_THAT(message_of<ConfigError>([&] {
                  const auto join = model.join();
                  if (world.rank() == 1) {
                    const auto local = model.no_sync();
                    loss_of(model->forward(inputs(1, 0)), 0).backward();
                  } else {
                    loss_of(model->forward(inputs(0, 0)), 0).backward();
                  }
                }),
                AllOf(HasSubstr("rank 1 ran out"), HasSubstr("no_sync")));
  });
}

TEST(Join, AnExceptionPassesAndTheOthersAreTold) {
  run_ranks(
      2,
      [](const World& world) {
        Net net(1);
        auto model = data_parallel(net, world);
        if (world.rank() == 1) {
          EXPECT_EQ(message_of<std::logic_error>([&] {
                      const auto join = model.join();
                      throw std::logic_error("a bad batch");
                    }),
                    "a bad batch");
          return;
        }
        EXPECT_THAT(message_of<CommError>([&] {
                      const auto join = model.join();
                      loss_of(model->forward(inputs(0, 0)), 0).backward();
                    }),
                    HasSubstr("rank 1"));
      },
      std::chrono::milliseconds(1500));
}

TEST(Join, OneAtATime) {
  run_ranks(1, [](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    const auto join = model.join();
    EXPECT_THAT(message_of<ConfigError>([&] { (void)model.join(); }), HasSubstr("another guard"));
  });
}

}  // namespace
}  // namespace lockstep
