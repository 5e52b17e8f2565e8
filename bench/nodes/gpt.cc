// lockstep's side of ../nodes_training.py: the recipe `gpt` (its model, text, held-out blocks,
// order of samples, optimizer, schedule and clipping, as ddp_gpt.py), one process of each node,
// over the engine that lockstep chooses; and the parts of a step, each alone.
//
//   gpt WAY BATCH STEPS FOLDER     with RANK, WORLD_SIZE, LOCAL_RANK … as torchrun sets them
//
// WAY: fp32, bf16, int8 (data_parallel, in what form gradients travel), diloco, diloco-int8 (a
// meeting every 50 steps), compute, forward (no rank hears of the others), communicate (gradients
// are averaged and nothing is computed). BATCH: samples of all ranks. FOLDER: empty, of all nodes.
// Rank 0 prints a JSON line: the median of the steps' times, and samples over all of their time, on
// the slowest rank.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <numeric>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/base/hash.h"
#include "lockstep/cluster/world.h"
#include "lockstep/data/dataset.h"
#include "lockstep/data/ledger.h"
#include "lockstep/parallel/clip_grad_norm.h"
#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/local_sgd.h"
#include "lockstep/recipes/model.h"
#include "lockstep/recipes/text.h"
#include "lockstep/recipes/works.h"
#include "lockstep/update/optimizer.h"

namespace lockstep {
namespace {

constexpr std::uint64_t kSettlingSteps = 10, kSeed = 1, kSplitSeed = 42;
constexpr double kClip = 1.0, kHeldOut = 0.05;
constexpr int kMeetEvery = 50;

struct Arguments {
  std::string way;
  std::uint64_t batch = 0, steps = 0;
  std::filesystem::path folder;
};

// Every process's text by rank.
std::vector<std::string> exchange(const std::filesystem::path& folder, const Place& place,
                                  const std::string& mine) {
  write_file_atomically(folder / std::to_string(place.rank), mine);
  std::vector<std::string> all;
  for (const Deadline deadline = Deadline::after(std::chrono::seconds(60));;) {
    const auto path = folder / std::to_string(all.size());
    if (std::filesystem::exists(path))
      all.push_back(read_text_file(path));
    else if (deadline.expired())
      throw Error(fmt::format("rank {} did not come", all.size()));
    else
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    if (all.size() == static_cast<std::size_t>(place.size)) return all;
  }
}

class Training {
 public:
  Training(const Arguments& arguments, const World& world)
      : arguments_(arguments),
        world_(world),
        sets_(split_dataset(load_text(libtorch_headers(), settings_.context + 1), kHeldOut,
                            kSplitSeed)),
        model_(make_model(settings_, {settings_.context + 1}, kByteValues, kSeed)),
        optimizer_(model_.module->parameters(),
                   torch::optim::AdamWOptions(schedule_.lr).weight_decay(0.1)) {
    schedule_.total_steps = static_cast<std::int64_t>(arguments.steps);
    choose_way();
  }

  void run() {
    std::vector<double> took;
    for (std::uint64_t step = 0; step < arguments_.steps; ++step) {
      if (step == kSettlingSteps) world_.group().barrier();
      const auto start = Clock::now();
      step_(step);
      if (step >= kSettlingSteps) took.push_back(seconds(Clock::now() - start));
    }
    double slowest[2] = {std::accumulate(took.begin(), took.end(), 0.0)};
    const auto median = took.begin() + static_cast<std::ptrdiff_t>(took.size() / 2);
    std::ranges::nth_element(took, median);
    slowest[1] = *median;
    world_.group().all_reduce(std::as_writable_bytes(std::span(slowest)), Dtype::float64,
                              Reduction::max);
    const double loss = test_loss();
    if (world_.rank() != 0) return;
    fmt::print("{{\"step_s\": {}, \"samples_per_s\": {}, \"test_loss\": {}}}\n", slowest[1],
               static_cast<double>(took.size() * arguments_.batch) / slowest[0], loss);
    std::fflush(stdout);
  }

 private:
  void choose_way() {
    const std::string& way = arguments_.way;
    const WireFormat format = way.ends_with("int8")   ? WireFormat::int8
                              : way.ends_with("bf16") ? WireFormat::bf16
                                                      : WireFormat::fp32;
    step_ = [this](std::uint64_t step) { train(step); };
    if (way == "communicate") {
      const auto all = std::accumulate(
          parameters().begin(), parameters().end(), std::int64_t{0},
          [](std::int64_t sum, const at::Tensor& parameter) { return sum + parameter.numel(); });
      const auto gradients =
          world_.group().allocate(static_cast<std::size_t>(all) * sizeof(float), "gradients");
      step_ = [this, gradients](std::uint64_t) {
        world_.group().all_reduce(gradients, Dtype::float32, Reduction::mean);
      };
    } else if (way == "forward") {
      step_ = [this](std::uint64_t step) { loss_of(batch(step)); };
    } else if (way.starts_with("diloco")) {
      diloco_.emplace(*model_.module, world_,
                      DiLoCoOptions{.sync_every = kMeetEvery, .wire_format = format});
    } else if (way != "compute") {
      replica_.emplace(*model_.module, world_, DataParallelOptions{.wire_format = format});
    }
  }

  void train(std::uint64_t step) {
    const double rate = learning_rate(schedule_, static_cast<std::int64_t>(step));
    static_cast<torch::optim::AdamWOptions&>(optimizer_.param_groups()[0].options()).lr(rate);
    optimizer_.zero_grad();
    loss_of(batch(step)).backward();
    clip_grad_norm_(parameters(), kClip);
    optimizer_.step();
    if (diloco_) diloco_->step();
  }

  const std::vector<at::Tensor>& parameters() { return optimizer_.param_groups()[0].params(); }

  at::Tensor loss_of(const Batch& batch) {
    return mean_loss(model_.forward(batch.input), batch.target);
  }

  Batch batch(std::uint64_t step) const {
    const std::uint64_t own = arguments_.batch / static_cast<std::uint64_t>(world_.size());
    const std::uint64_t per_epoch = sets_.train.rows / arguments_.batch;
    const Permutation order(sets_.train.rows, mix({kSeed, step / per_epoch}));
    std::vector<std::uint64_t> rows(own);
    for (std::uint64_t i = 0; i < own; ++i)
      rows[i] = order(step % per_epoch * arguments_.batch +
                      static_cast<std::uint64_t>(world_.rank()) * own + i);
    return TextBatches(sets_.train).batch(rows);
  }

  // Of all ranks together.
  double test_loss() {
    if (diloco_) diloco_->synchronize();
    const at::NoGradGuard no_grad;
    const TextBatches blocks(sets_.test);
    double sums[2] = {0, 0};
    const auto size = static_cast<std::uint64_t>(world_.size());
    for (std::uint64_t i = static_cast<std::uint64_t>(world_.rank()); i < blocks.size();
         i += size) {
      const Batch one = blocks.batch({&i, 1});
      const LossValue loss = text_loss(model_.forward(one.input), one.target);
      sums[0] += loss.sum.item<double>();
      sums[1] += loss.weight;
    }
    world_.group().all_reduce(std::as_writable_bytes(std::span(sums)), Dtype::float64,
                              Reduction::sum);
    return sums[0] / sums[1];
  }

  const Arguments& arguments_;
  const World& world_;
  const ModelSettings settings_{.name = "gpt"};  // its defaults are the recipe's
  Schedule schedule_{.kind = Schedule::Kind::cosine, .lr = 2e-3, .warmup_steps = 50};
  const TrainTest sets_;
  const Model model_;
  torch::optim::AdamW optimizer_;
  std::optional<Replica> replica_;
  std::optional<DiLoCo> diloco_;
  std::function<void(std::uint64_t)> step_;
};

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  try {
    at::set_num_threads(1);
    const lockstep::Arguments arguments{argv[1], std::strtoull(argv[2], nullptr, 10),
                                        std::strtoull(argv[3], nullptr, 10), argv[4]};
    const lockstep::World world =
        lockstep::init({.exchange = [&](const lockstep::Place& place, const std::string& mine) {
          return lockstep::exchange(arguments.folder, place, mine);
        }});
    lockstep::Training(arguments, world).run();
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
