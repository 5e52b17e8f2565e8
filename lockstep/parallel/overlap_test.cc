// Gradients are reduced while backward runs: order of events, and what goes wrong meanwhile.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <barrier>
#include <semaphore>

#include "lockstep/parallel/replicas_test.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

constexpr std::chrono::seconds kPatience(60);  // only a bug lets it pass

// Rank 1's first bucket is full only when rank 0 has come to its last layer: a rank 0 that waited
// for its own first bucket would never come there.
TEST(Overlap, BackwardGoesOnWhileABucketTravels) {
  std::binary_semaphore at_the_last(0);
  run_ranks(2, [&](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world, kWays[2]);
    if (world.rank() == 0)
      net->first->weight.register_hook([&](const at::Tensor& gradient) {
        at_the_last.release();
        return gradient;
      });
    else
      net->second->weight.register_hook([&](const at::Tensor& gradient) {
        EXPECT_TRUE(at_the_last.try_acquire_for(kPatience));
        return gradient;
      });
    loss_of(model->forward(inputs(world.rank(), 0)), 0).backward();
    EXPECT_GT(model.communication().busy, Clock::duration::zero());
    EXPECT_GT(model.communication().exposed, Clock::duration::zero());
  });
}

// Large enough for gradients that are born in the bucket.
struct DeepImpl : torch::nn::Module {
  explicit DeepImpl(int seed) {
    for (int i = 0; i < 3; ++i) {
      const at::NoGradGuard no_grad;
      layers.push_back(register_module("layer" + std::to_string(i), torch::nn::Linear(150, 150)));
      for (auto& p : layers.back()->parameters()) p.copy_(numbers(p.sizes(), seed + i) * 0.1);
    }
  }
  at::Tensor forward(at::Tensor x) {
    for (auto& layer : layers) x = at::tanh(layer(x));
    return x;
  }
  std::vector<torch::nn::Linear> layers;
};
TORCH_MODULE(Deep);

std::vector<at::Tensor> gradients_of(Deep& net) {
  std::vector<at::Tensor> gradients;
  for (const auto& parameter : net->parameters()) gradients.push_back(parameter.grad().clone());
  return gradients;
}

// Two nodes of one rank each, as threads, that meet without an agent.
void run_nodes(const std::function<void(const World&)>& body) {
  std::vector<std::string> told(2), errors(2);
  std::barrier both(2);
  const Exchange exchange = [&](const Place& place, const std::string& text) {
    told[static_cast<std::size_t>(place.rank)] = text;
    both.arrive_and_wait();
    return told;
  };
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < 2; ++rank)
    threads.emplace_back([&, rank] {
      errors[static_cast<std::size_t>(rank)] = message_of<std::exception>([&] {
        body(init_from(
            {.launcher = Launcher::torchrun,
             .rank = rank,
             .size = 2,
             .job_id = "overlap " + std::to_string(::getpid()) + " node " + std::to_string(rank),
             .key = "a secret"},
            {.timeout = kPatience, .exchange = exchange}));
      });
    });
  threads.clear();
  EXPECT_THAT(errors, testing::Each("no error"));
}

TEST(Overlap, IsTheDefaultBetweenNodesAndGivesTheSameBits) {
  std::vector<std::vector<at::Tensor>> bits[2];
  for (const std::optional<bool> overlap : {std::optional<bool>(), std::optional(false)}) {
    auto& mine = bits[overlap.has_value()];
    mine.resize(2);
    run_nodes([&](const World& world) {
      Deep net(1);
      auto model = data_parallel(net, world, {.bucket_cap_mb = 0.05, .overlap = overlap});
      model.set_weight(3 + world.rank());
      for (int step = 0; step < 3; ++step) {
        net->zero_grad();
        model(numbers({4, 150}, 2 * step + world.rank())).square().sum().backward();
      }
      EXPECT_EQ(model.communication().busy > Clock::duration::zero(), !overlap.has_value());
      mine[static_cast<std::size_t>(world.rank())] = gradients_of(net);
    });
  }
  expect_equal(bits[0][0], bits[0][1]);
  expect_equal(bits[0][0], bits[1][0]);
}

// An exception of the user's leaves a bucket under way. On rank 0 the next backward starts while it
// is, because rank 1 comes to it only then.
TEST(Overlap, ABackwardAfterOneThatWasInterrupted) {
  std::vector<at::Tensor> expected;
  run_ranks(2, [&](const World& world) {
    Deep net(1);
    auto model = data_parallel(net, world);
    model(numbers({4, 150}, world.rank())).square().sum().backward();
    if (world.rank() == 0) expected = gradients_of(net);
  });
  Results results;
  std::binary_semaphore second(0);
  run_ranks(2, [&](const World& world) {
    Deep net(1);
    auto model = data_parallel(net, world, {.bucket_cap_mb = 0.05, .overlap = true});
    bool interrupt = true;
    const auto backward = [&](int seed) {
      net->zero_grad();
      const at::Tensor output = model(numbers({4, 150}, seed));
      output.register_hook([&](const at::Tensor& gradient) {
        const bool comes = world.rank() == 0 || !interrupt || second.try_acquire_for(kPatience);
        EXPECT_TRUE(comes);
        if (!interrupt && world.rank() == 0) second.release();
        return gradient;
      });
      output.square().sum().backward();
    };
    net->layers[1]->weight.register_hook([&](const at::Tensor& gradient) {
      if (interrupt) throw Error("interrupted");
      return gradient;
    });
    EXPECT_THAT(message_of<std::exception>([&] { backward(7); }), HasSubstr("interrupted"));
    interrupt = false;
    backward(world.rank());
    results.put(world.rank(), gradients_of(net));
  });
  results.expect_all(2, expected);
}

TEST(Overlap, ARankThatStaysAwayIsACommErrorOfEveryBackward) {
  run_ranks(
      2,
      [](const World& world) {
        Net net(1);
        auto model = data_parallel(net, world, kWays[2]);
        if (world.rank() == 1) return;
        const auto backward = [&] { loss_of(model->forward(inputs(0, 0)), 0).backward(); };
        const std::string error = message_of<CommError>(backward);
        EXPECT_THAT(error, HasSubstr("rank 1"));
        EXPECT_EQ(message_of<CommError>(backward), error);
      },
      std::chrono::milliseconds(1500));
}

TEST(Overlap, AFailureNamesTheBucket) {
  run_ranks(2, [](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world, kWays[2]);
    if (world.rank() == 0) {
      EXPECT_THAT(
          message_of<CommError>([&] { loss_of(model->forward(inputs(0, 0)), 0).backward(); }),
          HasSubstr("gradients of second.bias and 1 m"));
      return;
    }
    std::vector<std::byte> record(17), records(34);
    record[8 + 5] = std::byte{1};  // it takes part, with weight 0 as rank 0's is 1
    world.group().all_gather(record, records, Dtype::uint8, {});
    EXPECT_THROW(world.group().barrier({.tag = "something else"}), CommError);
  });
}

}  // namespace
}  // namespace lockstep
