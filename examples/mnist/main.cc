// An ordinary libtorch program, made parallel by three lines: init, data_parallel and
// make_data_loader. The same program runs alone and on any number of workers:
//
//   example-mnist
//   lockstep run --nproc-per-node 2 example-mnist [FOLDER] [EPOCHS]
//
// FOLDER holds MNIST, or Fashion-MNIST, unpacked (train-images-idx3-ubyte …). Without it: images
// made up on the spot.
#include <lockstep/lockstep.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>

struct NetImpl : torch::nn::Module {
  torch::nn::Linear hidden{register_module("hidden", torch::nn::Linear(784, 64))};
  torch::nn::Linear output{register_module("output", torch::nn::Linear(64, 10))};
  torch::Tensor forward(torch::Tensor images) {
    return output(torch::relu(hidden(images.flatten(1))));
  }
};
TORCH_MODULE(Net);

// Class c is a bright row c in an image of noise.
struct MadeUp : torch::data::Dataset<MadeUp> {
  torch::data::Example<> get(std::size_t index) override {
    const auto label = static_cast<std::int64_t>(index % 10);
    auto generator = torch::make_generator<torch::CPUGeneratorImpl>(index);
    auto image = torch::rand({1, 28, 28}, generator);
    image[0][2 * label] += 1;
    return {image, torch::tensor(label)};
  }
  std::optional<std::size_t> size() const override { return 2000; }
};

template <typename Dataset>
void train(Dataset dataset, int epochs) {
  auto world = lockstep::init();  // lockstep run, torchrun, mpirun or srun; alone: a world of one
  Net net;                        // any torch::nn::Module
  auto model = lockstep::data_parallel(net, world);
  torch::optim::Adam optimizer(net->parameters(), 1e-3);
  auto loader = lockstep::make_data_loader(dataset.map(torch::data::transforms::Stack<>()), world,
                                           {.batch_size = 64, .seed = 1});
  for (int epoch = 0; epoch < epochs; ++epoch) {
    loader->set_epoch(epoch);
    double sum = 0;
    for (auto& batch : *loader) {
      optimizer.zero_grad();
      torch::Tensor loss = torch::cross_entropy_loss(model->forward(batch.data), batch.target);
      loss.backward();
      optimizer.step();
      sum += loss.item<double>();
    }
    if (world.rank() == 0)
      std::printf("epoch %d: loss %.4f on rank 0 of %d\n", epoch + 1,
                  sum / static_cast<double>(loader->size()), world.size());
  }
}

int main(int argc, char** argv) {
  const int epochs = argc > 2 ? std::atoi(argv[2]) : 2;
  if (argc > 1)
    train(torch::data::datasets::MNIST(argv[1]), epochs);
  else
    train(MadeUp(), epochs);
}
