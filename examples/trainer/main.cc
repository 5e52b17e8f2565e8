// Training without a loop of one's own: evaluated, checkpointed and resumed, with the same result,
// bit for bit, on 1 to 4 workers.
//
//   lockstep run --nproc-per-node 2 example-trainer FOLDER [EPOCHS]
//
// FOLDER is for checkpoints. Run again on it, with more epochs or after a crash, the program goes
// on where it stopped.
#include <lockstep/lockstep.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>

struct NetImpl : torch::nn::Module {
  torch::nn::Linear hidden{register_module("hidden", torch::nn::Linear(196, 64))};
  torch::nn::BatchNorm1d norm{register_module("norm", torch::nn::BatchNorm1d(64))};
  torch::nn::Dropout dropout{register_module("dropout", torch::nn::Dropout(0.2))};
  torch::nn::Linear output{register_module("output", torch::nn::Linear(64, 10))};
  torch::Tensor forward(torch::Tensor images) {
    return output(dropout(torch::relu(norm(hidden(images.flatten(1))))));
  }
};
TORCH_MODULE(Net);

// Class c is a brighter row c in an image of noise.
struct MadeUp : torch::data::Dataset<MadeUp> {
  std::size_t first, count;
  MadeUp(std::size_t first, std::size_t count) : first(first), count(count) {}
  torch::data::Example<> get(std::size_t index) override {
    const auto label = static_cast<std::int64_t>(index % 10);
    auto generator = torch::make_generator<torch::CPUGeneratorImpl>(first + index);
    auto image = torch::rand({1, 14, 14}, generator);
    image[0][label] += 0.3;
    return {image, torch::tensor(label)};
  }
  std::optional<std::size_t> size() const override { return count; }
};

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: example-trainer FOLDER [EPOCHS]\n"), 2;
  auto world = lockstep::init();  // lockstep run, torchrun, mpirun or srun; alone: a world of one
  torch::manual_seed(1);
  Net net;  // any torch::nn::Module
  const auto report_epoch = [&](const lockstep::EpochSummary& epoch) {
    if (world.rank() == 0)
      std::printf("epoch %d: test loss %.4f, accuracy %.1f %%\n", static_cast<int>(epoch.epoch),
                  epoch.test_loss, 100 * epoch.test_accuracy);
    return true;  // go on
  };
  lockstep::Trainer trainer(world, {.epochs = argc > 2 ? std::atoi(argv[2]) : 3,
                                    .global_batch_size = 64,
                                    .virtual_ranks = 4,
                                    .checkpoint_dir = argv[1],
                                    .resume = true,
                                    .callbacks = {.on_epoch = report_epoch}});
  auto report = trainer.fit(net, lockstep::Adam({.lr = 1e-3}), MadeUp(0, 2000), MadeUp(2000, 500),
                            lockstep::cross_entropy);
  double sum = 0;
  for (const auto& parameter : net->parameters())
    sum += parameter.to(torch::kDouble).sum().item<double>();
  if (world.rank() == 0)
    std::printf("%d steps, stopped after %s; sum of the weights %.17g\n",
                static_cast<int>(report.steps), report.stopped_because.c_str(), sum);
}
