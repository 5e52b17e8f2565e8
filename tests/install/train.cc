// One linear layer learns to double its input, on as many workers as there are.
#include <lockstep/lockstep.h>
#include <torch/torch.h>

#include <cstdio>

int main() {
  auto world = lockstep::init();
  torch::manual_seed(1 + world.rank());  // data_parallel makes the weights equal
  torch::nn::Linear net(1, 1);
  auto model = lockstep::data_parallel(net, world);
  torch::optim::SGD optimizer(net->parameters(), 0.5);
  for (int step = 0; step < 1000; ++step) {
    optimizer.zero_grad();
    auto input = torch::rand({16, 1});
    torch::mse_loss(model->forward(input), 2 * input).backward();
    optimizer.step();
  }
  std::printf("%d workers, 2 x 3 = %.1f\n", world.size(),
              net->forward(torch::full({1, 1}, 3.0)).item<float>());
}
