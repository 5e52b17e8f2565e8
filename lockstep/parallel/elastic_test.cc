#include "lockstep/parallel/elastic.h"

#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <string>

#include "lockstep/bridge/optimizer_state.h"
#include "lockstep/parallel/generations_test.h"

namespace lockstep {
namespace {

torch::nn::Sequential make_net(int seed) {
  torch::nn::Sequential net(torch::nn::Linear(5, 7), torch::nn::BatchNorm1d(7),
                            torch::nn::Linear(7, 1));
  const at::NoGradGuard no_grad;
  float value = 0.1f * static_cast<float>(seed);
  for (at::Tensor& parameter : net->parameters())
    parameter.copy_(at::linspace(-1, value += 0.3f, parameter.numel()).view(parameter.sizes()));
  return net;
}

at::Tensor loss_of(torch::nn::Sequential& net, std::uint64_t step, int part) {
  const at::Tensor x =
      (at::arange(20, at::kFloat).view({4, 5}) * float(step + 1) + float(part)).sin();
  return (net->forward(x) - x.sum(1, true)).pow(2).sum();
}

std::vector<at::Tensor> copies(torch::nn::Sequential& net) {
  std::vector<at::Tensor> all;
  for (const at::Tensor& one : net->parameters()) all.push_back(one.detach().clone());
  for (const at::Tensor& one : net->buffers()) all.push_back(one.detach().clone());
  return all;
}

enum class Kind { shared, replicated };
constexpr std::uint64_t kSteps = 12;

// A worker that is killed in the step `when`, before or after its backward.
struct Death {
  std::uint64_t when = kSteps;
  bool late = false;
  std::atomic<bool>* happened = nullptr;
};

struct Results {
  std::mutex mutex;
  std::vector<std::vector<at::Tensor>> tensors;
};

void live(Kind kind, const World& world, int seed, const Death& death, Results& results) {
  torch::nn::Sequential net = make_net(seed);
  const auto die = [&](std::uint64_t step, bool late) {
    if (step != death.when || late != death.late || death.happened == nullptr) return;
    *death.happened = true;
    death.happened->notify_all();
    throw Killed{};
  };
  elastic::End end;
  if (kind == Kind::shared) {
    elastic::Shared state(net, Adam({.lr = 0.01}), {.virtual_ranks = 2});
    end = elastic::run(world, state, [&](auto& model) {
      if (state.step() == kSteps) return false;
      model.step([&](int virtual_rank) -> VirtualLoss {
        die(state.step(), false);
        const at::Tensor loss = loss_of(net, state.step(), virtual_rank);
        loss.backward();
        die(state.step(), true);
        return {loss.item<double>(), 4.0};
      });
      return true;
    });
  } else {
    torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(0.01));
    elastic::Replicated state(net, optimizer);
    end = elastic::run(world, state, [&](auto&) {
      if (state.step() == kSteps) return false;
      die(state.step(), false);
      optimizer.zero_grad();
      loss_of(net, state.step(), world.rank()).backward();
      die(state.step(), true);
      optimizer.step();
      return true;
    });
  }
  EXPECT_EQ(end, elastic::End::done);
  const std::lock_guard lock(results.mutex);
  results.tensors.push_back(copies(net));
}

std::vector<at::Tensor> undisturbed(Kind kind) {
  Results results;
  Generations job(2, 2);
  for (const int seat : {0, 1})
    job.start(seat, [&, seat](const World& world) { live(kind, world, seat, {}, results); });
  job.say({0, 1}, true);
  job.join();
  return results.tensors.at(0);
}

class ElasticLoop : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Kinds, ElasticLoop, testing::Values(Kind::shared, Kind::replicated),
                         [](const auto& info) {
                           return info.param == Kind::shared ? "Shared" : "Replicated";
                         });

TEST_P(ElasticLoop, EndsWithTheSameBitsWhoeverDies) {
  const auto expected = undisturbed(GetParam());
  for (const int victim : {0, 1})
    for (const std::uint64_t when : {0, 1, 7, 11})
      for (const bool late : {false, true}) {
        SCOPED_TRACE(testing::Message() << "seat " << victim << " in step " << when << late);
        Results results;
        std::atomic<bool> dead = false;
        Generations job(2, 2);
        for (const int seat : {0, 1})
          job.start(seat, [&, seat](const World& world) {
            live(GetParam(), world, seat, seat == victim ? Death{when, late, &dead} : Death{},
                 results);
          });
        job.say({0, 1}, true);
        dead.wait(false);
        job.start(2, [&](const World& world) { live(GetParam(), world, 2, {}, results); });
        // A replica's virtual rank is its rank: the newcomer takes the dead one's.
        job.say(victim == 0 ? std::vector{2, 1} : std::vector{0, 2}, true);
        job.join();
        ASSERT_EQ(results.tensors.size(), 2u);
        for (const auto& found : results.tensors)
          for (std::size_t i = 0; i < expected.size(); ++i)
            EXPECT_TRUE(at::equal(found[i], expected[i])) << "tensor " << i;
      }
}

TEST(ElasticLoop, AskedToStopAllStopAfterTheSameStep) {
  Generations job(2, 2);
  std::atomic<std::uint64_t> sum = 0;
  for (const int seat : {0, 1})
    job.start(seat, [&, seat](const World& world) {
      torch::nn::Sequential net = make_net(seat);
      elastic::Shared state(net, SGD{});
      const auto end = elastic::run(world, state, [&](auto& model) {
        loss_of(net, state.step(), world.rank()).backward();
        if (state.step() == 5 && seat == 0) request_stop(job.segment());
        model.step();
        return true;
      });
      EXPECT_EQ(end, elastic::End::stopped);
      sum += state.step();
    });
  job.say({0, 1}, true);
  job.join();
  EXPECT_EQ(sum % 2, 0u);
  EXPECT_GE(sum, 12u);
}

template <typename Optimizer, typename Options>
void expect_equal_steps(const Options& options) {
  torch::nn::Sequential one = make_net(1), other = make_net(1);
  Optimizer first(one->parameters(), options), second(other->parameters(), options);
  const auto step = [](torch::nn::Sequential& net, Optimizer& optimizer, std::uint64_t number) {
    optimizer.zero_grad();
    loss_of(net, number, 0).backward();
    optimizer.step();
  };
  for (const std::uint64_t number : {0, 1}) step(one, first, number);
  const auto bytes = optimizer_state(first);
  set_optimizer_state(second, bytes);
  {
    const at::NoGradGuard no_grad;
    const auto from = one->parameters(), to = other->parameters();
    for (std::size_t i = 0; i < to.size(); ++i) to[i].copy_(from[i]);
  }
  step(one, first, 2);
  step(other, second, 2);
  for (std::size_t i = 0; i < one->parameters().size(); ++i)
    EXPECT_TRUE(at::equal(one->parameters()[i], other->parameters()[i]));
  EXPECT_THROW(set_optimizer_state(second, std::span(bytes).first(bytes.size() - 1)), Error);
}

// Who is left when others have finished may be fewer than the least number: more of the tree is its
// part than of anybody's before, and its neighbour's memory is not.
TEST(ElasticLoop, BelowTheLeastNumberAWorkerKeepsToItsMemory) {
  Generations job(3, 3);
  const auto room = job.segment().allocate(1, 64, "the neighbour's");
  job.start(0, [](const World& world) {
    torch::nn::Sequential net = make_net(1);
    elastic::Shared state(net, Adam({.lr = 0.01}), {.virtual_ranks = 8});
    elastic::run(world, state, [&](auto& model) {
      if (state.step() == 2) return false;
      model.step([&](int virtual_rank) -> VirtualLoss {
        const at::Tensor loss = loss_of(net, state.step(), virtual_rank);
        loss.backward();
        return {loss.item<double>(), 4.0};
      });
      return true;
    });
  });
  job.say({0}, true);
  job.join();
  const auto offset = static_cast<std::uint64_t>(job.segment().offset_of(room.data()));
  for (const std::byte byte : job.segment().at(1, offset, 64 << 10)) ASSERT_EQ(byte, std::byte{0});
}

// A replica of which the giver, who died, has changed a part belongs to no step.
struct DeadlyOptions : torch::optim::AdamOptions {
  explicit DeadlyOptions(std::atomic<int>& gifts) : AdamOptions(0.01), gifts_left(gifts) {}
  double get_lr() const override {
    if (armed && --gifts_left == 0) throw Killed{};
    return AdamOptions::get_lr();
  }
  std::unique_ptr<torch::optim::OptimizerOptions> clone() const override {
    return std::make_unique<DeadlyOptions>(*this);
  }
  std::atomic<int>& gifts_left;
  bool armed = true;
};

TEST(ElasticLoop, AReplicaThatIsHalfReceivedIsNotTaken) {
  Generations job(1, 2);
  std::atomic<int> gifts_left = 2;  // at the beginning, and the one that ends it
  std::atomic<bool> failed = false, updated = false;
  const auto loop = [&](const World& world, bool gives) {
    torch::nn::Sequential net = make_net(1);
    torch::optim::Adam optimizer(net->parameters(), torch::optim::AdamOptions(0.01));
    if (gives) optimizer.param_groups()[0].set_options(std::make_unique<DeadlyOptions>(gifts_left));
    elastic::Replicated state(net, optimizer);
    elastic::run(world, state, [&](auto&) {
      if (state.step() == 8) return false;
      optimizer.zero_grad();
      loss_of(net, state.step(), world.rank()).backward();
      if (!gives && state.step() == 3) {
        updated.wait(false);  // or both would be at the same step, and nothing be received
        job.say({0, 1}, true);
        throw CommError("the generation ends before this rank has made the update");
      }
      optimizer.step();
      if (gives && state.step() == 3) updated = true, updated.notify_all();
      return true;
    });
  };
  job.start(0, [&](const World& world) {
    try {
      loop(world, true);
    } catch (const Killed&) {
      job.say({1}, true);
    }
  });
  job.start(1, [&](const World& world) {
    try {
      loop(world, false);
    } catch (const Error&) {
      failed = true;
    }
  });
  job.say({0, 1}, true);
  job.join();
  EXPECT_TRUE(failed);
}

// Its agent changes no generation that has not been taken up.
TEST(ElasticLoop, SaysThatTheFirstGenerationHasMadeAStep) {
  Generations job(1, 1);
  int pipe[2];
  ASSERT_EQ(::pipe(pipe), 0);
  Place place{.launcher = Launcher::lockstep};
  place.seat = 0;
  place.segment_fd = ::dup(job.segment().fd());
  place.event_fd = pipe[1];
  job.say({0}, true);
  {
    const World world = init_from(place, {.join = false});
    torch::nn::Sequential net = make_net(1);
    elastic::Shared state(net, Adam({.lr = 0.01}));
    elastic::run(world, state, [&](auto& model) {
      if (state.step() == 2) return false;
      loss_of(net, state.step(), 0).backward();
      model.step();
      return true;
    });
  }
  std::string said(4096, '\0');
  said.resize(static_cast<std::size_t>(::read(pipe[0], said.data(), said.size())));
  ::close(pipe[0]);
  const auto first = said.find("first_step");
  EXPECT_NE(first, said.npos);
  EXPECT_EQ(said.find("first_step", first + 1), said.npos);
}

TEST(OptimizerState, IsGivenToAnother) {
  expect_equal_steps<torch::optim::SGD>(
      torch::optim::SGDOptions(0.01).momentum(0.9).dampening(0.1));
  expect_equal_steps<torch::optim::Adam>(torch::optim::AdamOptions(0.01).amsgrad(true));
  expect_equal_steps<torch::optim::AdamW>(torch::optim::AdamWOptions(0.01));
  expect_equal_steps<torch::optim::RMSprop>(torch::optim::RMSpropOptions(0.01).centered(true));
}

}  // namespace
}  // namespace lockstep
