// Nodes that die, are cut off or come later, while shared weights are trained on them.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <atomic>
#include <map>
#include <mutex>
#include <string>

#include "lockstep/parallel/elastic.h"
#include "lockstep/parallel/generations_test.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using Nodes = std::vector<std::vector<int>>;
constexpr std::uint64_t kSteps = 12;

torch::nn::Sequential make_net(int seed) {
  torch::nn::Sequential net(torch::nn::Linear(5, 70), torch::nn::BatchNorm1d(70),
                            torch::nn::Linear(70, 30), torch::nn::Linear(30, 1));
  const at::NoGradGuard no_grad;
  float value = 0.1f * static_cast<float>(seed);
  for (at::Tensor& parameter : net->parameters())
    parameter.copy_(at::linspace(-1, value += 0.3f, parameter.numel()).view(parameter.sizes()));
  return net;
}

VirtualLoss step_of(SharedWeights& weights, torch::nn::Sequential& net, std::uint64_t step,
                    int part) {
  const at::Tensor x =
      (at::arange(20, at::kFloat).view({4, 5}) * float(step + 1) + float(part)).sin();
  const at::Tensor loss = (net->forward(x) - x.sum(1, true)).pow(2).sum();
  if (step % 3 != 0) weights.last_backward(4.0);
  loss.backward();
  return {loss.item<double>(), 4.0};
}

// What a test sees and does before a step; it throws Killed for a worker that is to die there.
using Before = std::function<void(const World&, std::uint64_t step)>;

struct Job : Generations {
  explicit Job(int nodes, WireFormat format = WireFormat::fp32)
      : Generations(1, 4, nodes), wire_format(format) {}

  void start_worker(Seat at, const std::string& inject = "", const Before& before = {}) {
    start(
        at,
        [this, at, before](const World& world) {
          torch::nn::Sequential net = make_net(at.node * 8 + at.seat);
          elastic::Shared state(
              net, Adam({.lr = 0.01}),
              {.virtual_ranks = 4, .clip_grad_norm = 1, .wire_format = wire_format});
          try {
            const auto end = elastic::run(world, state, [&](auto& model) {
              note(world, model.weights().origin());
              if (state.step() == kSteps) return false;
              if (before) before(world, state.step());
              model.step([&](int virtual_rank) {
                return step_of(model.weights(), net, state.step(), virtual_rank);
              });
              return true;
            });
            if (end == elastic::End::released) return;
          } catch (const CommError&) {
            throw;
          } catch (const Error& error) {  // the fault that was asked for
            EXPECT_THAT(error.what(), HasSubstr("asked for"));
            ++deaths;
            deaths.notify_all();
            return;
          }
          std::vector<at::Tensor> values;
          for (const at::Tensor& one : net->parameters()) values.push_back(one.detach().clone());
          for (const at::Tensor& one : net->buffers()) values.push_back(one.detach().clone());
          const std::lock_guard lock(mutex);
          results.push_back(std::move(values));
        },
        inject);
  }
  void await_deaths(int number) {
    for (int seen = deaths; seen < number; seen = deaths) deaths.wait(seen);
  }
  void note(const World& world, const WeightsOrigin& origin) {
    const std::lock_guard lock(mutex);
    if (world.rank() == 0 && !origin.reason.empty()) reasons[world.generation()] = origin.reason;
    if (origin.from_peer) ++peers;
  }

  const WireFormat wire_format;
  std::mutex mutex;
  std::vector<std::vector<at::Tensor>> results;
  std::map<std::uint64_t, std::string> reasons;  // of rank 0, by generation
  int peers = 0;
  std::atomic<int> deaths = 0;
};

const std::vector<at::Tensor>& undisturbed() {
  static const std::vector<at::Tensor> values = [] {
    Job job(1);
    job.start_worker({0, 0});
    job.say({0}, true);
    job.join();
    return job.results.at(0);
  }();
  return values;
}

void expect_results(Job& job, std::size_t workers) {
  job.join();
  ASSERT_EQ(job.results.size(), workers);
  for (const auto& found : job.results)
    for (std::size_t i = 0; i < found.size(); ++i)
      EXPECT_TRUE(at::equal(found[i], undisturbed()[i])) << "tensor " << i;
}

constexpr const char* kPhases[] = {"start",   "computed", "sealed",
                                   "decided", "updating", "committed"};

// Of two nodes with two workers each, the second one dies; the first goes on, alone or with a new
// one.
TEST(NodesElastic, ANodeDiesInAnyPhase) {
  for (const char* phase : kPhases)
    for (const bool replaced : {false, true}) {
      SCOPED_TRACE(testing::Message() << phase << (replaced ? ", replaced" : ""));
      Job job(replaced ? 3 : 2);
      const auto fault = [&](int rank) {
        return fmt::format("throw rank={} step=5 when={}", rank, phase);
      };
      for (const int seat : {0, 1}) {
        job.start_worker({0, seat});
        job.start_worker({1, seat}, fault(2 + seat));
        if (replaced) job.start_worker({2, seat});
      }
      job.say_nodes({{0, 1}, {0, 1}}, true);
      job.await_deaths(1);
      // Its other worker dies of the same, or of what the agent does to it.
      job.say_nodes(replaced ? Nodes{{0, 1}, {}, {0, 1}} : Nodes{{0, 1}, {}}, true);
      publish(job.segment(1), {.number = 1, .seats = {5}, .reason = "dead"}, true);
      expect_results(job, replaced ? 4 : 2);
      EXPECT_EQ(job.peers > 0, replaced);
    }
}

// What it was still to send is lost with it, and what the others were with the generation: less
// than a step's rounding. All have the same weights, bit for bit.
TEST(NodesElastic, ANodeDiesWhereGradientsAreRounded) {
  for (const char* phase : kPhases) {
    SCOPED_TRACE(phase);
    Job job(3, WireFormat::int8);
    for (const int seat : {0, 1}) job.start_worker({0, seat});
    job.start_worker({1, 0}, fmt::format("throw rank=2 step=5 when={}", phase));
    job.start_worker({2, 0});
    job.say_nodes({{0, 1}, {0}}, true);
    job.await_deaths(1);
    job.say_nodes({{0, 1}, {}, {0}}, true);
    job.join();
    ASSERT_EQ(job.results.size(), 3u);
    for (const auto& found : job.results)
      for (std::size_t i = 0; i < found.size(); ++i)
        EXPECT_TRUE(at::equal(found[i], job.results[0][i])) << "tensor " << i;
    EXPECT_FALSE(at::equal(job.results[0][0], undisturbed()[0])) << "nothing was rounded";
    EXPECT_GT(job.peers, 0);
  }
}

// The node of rank 0 dies: its successor has the record, or can do without it.
TEST(NodesElastic, TheFirstNodeDiesInAnyPhase) {
  for (const char* phase : kPhases) {
    SCOPED_TRACE(phase);
    Job job(3);
    job.start_worker({0, 0}, fmt::format("throw rank=0 step=5 when={}", phase));
    job.start_worker({1, 0});
    job.start_worker({1, 1});
    job.start_worker({2, 0});
    job.say_nodes({{0}, {0, 1}}, true);
    job.await_deaths(1);
    job.say_nodes({{}, {0, 1}, {0}}, true);
    expect_results(job, 3);
    EXPECT_GT(job.peers, 0);
  }
}

// One worker of a node dies; its node has the weights. Another dies while that is put right.
TEST(NodesElastic, AWorkerDiesInAnyPhase) {
  for (const char* phase : kPhases) {
    SCOPED_TRACE(phase);
    Job job(2);
    job.start_worker({0, 0}, "throw rank=0 step=1 when=recovering");
    job.start_worker({0, 1});
    job.start_worker({1, 0}, fmt::format("throw rank=2 step=5 when={}", phase));
    job.start_worker({1, 1});
    job.start_worker({0, 2});
    job.start_worker({1, 2});
    job.say_nodes({{0, 1}, {0, 1}}, true);
    job.await_deaths(1);
    job.say_nodes({{0, 1}, {2, 1}}, true);
    job.await_deaths(2);
    job.say_nodes({{2, 1}, {2, 1}}, true);
    expect_results(job, 4);
    EXPECT_EQ(job.peers, 0);
  }
}

// A node is cut off in mid-step and comes back when the other is ahead.
TEST(NodesElastic, ANodeThatWasCutOffTakesTheNewestWeights) {
  Job job(2);
  std::atomic<int> stage = 0;
  const auto reach = [&](int next) {
    stage = next;
    stage.notify_all();
  };
  job.start_worker({0, 0}, "", [&](const World& world, std::uint64_t step) {
    if (world.generation() == 0 && step == 4) {
      reach(1);
      stage.wait(1);
    }
    if (world.generation() == 1 && step == 9) {
      reach(3);
      stage.wait(3);
    }
  });
  job.start_worker({1, 0});
  job.say_nodes({{0}, {0}}, true);
  stage.wait(0);
  job.say_nodes({{0}, {}}, true);  // the second node does not hear of it
  reach(2);
  stage.wait(2);
  job.say_nodes({{0}, {0}}, true);
  reach(4);
  expect_results(job, 2);
  EXPECT_GT(job.peers, 0);
  EXPECT_THAT(job.reasons[2], HasSubstr("node 1, at step "));
}

// Nodes come one after the other, of different sizes; nothing is computed again.
TEST(NodesElastic, NodesJoinBetweenSteps) {
  Job job(3);
  std::atomic<int> stage = 0;  // odd: the first worker waits for the test
  const Before pause = [&](const World& world, std::uint64_t step) {
    const int wanted = static_cast<int>(world.generation()) * 2 + 1;
    if (step != 3 * (world.generation() + 1) || wanted > 3 || stage >= wanted) return;
    stage = wanted;
    stage.notify_all();
    stage.wait(wanted);
  };
  job.start_worker({0, 0}, "", pause);
  job.start_worker({1, 0});
  job.start_worker({1, 1});
  job.start_worker({2, 0});
  job.say_nodes({{0}}, true);
  for (const auto& next : {Nodes{{0}, {0, 1}}, Nodes{{0}, {0, 1}, {0}}}) {
    while (stage % 2 == 0) stage.wait(stage);
    job.say_nodes(next, false);
    ++stage;
    stage.notify_all();
  }
  expect_results(job, 4);
  EXPECT_THAT(job.reasons[2], HasSubstr("node 2, without weights, takes step 7 from node 0"));
}

}  // namespace
}  // namespace lockstep
