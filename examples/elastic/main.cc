// A training loop of one's own that survives its workers: kill one, stop one, add one while it
// runs; the weights are those of a run that nothing happened to.
//
//   lockstep run --nproc-per-node 2 --max-restarts 10 example-elastic [STEPS]
//
// It learns y = sin(a sum of x) from samples made up on the spot and prints a hash of its weights.
#include <lockstep/lockstep.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

struct NetImpl : torch::nn::Module {
  torch::nn::Linear hidden{register_module("hidden", torch::nn::Linear(16, 64))};
  torch::nn::Linear output{register_module("output", torch::nn::Linear(64, 1))};
  torch::Tensor forward(torch::Tensor x) { return output(torch::tanh(hidden(x))); }
};
TORCH_MODULE(Net);

// What is computed in a step follows from its number and the virtual rank alone.
torch::Tensor inputs(std::uint64_t step, int virtual_rank) {
  auto generator =
      torch::make_generator<torch::CPUGeneratorImpl>(1000 * step + std::uint64_t(virtual_rank));
  return torch::rand({64, 16}, generator);
}

std::uint64_t hash_of(const torch::nn::Module& module) {
  std::uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const torch::Tensor& parameter : module.parameters()) {
    const auto* bytes = static_cast<const unsigned char*>(parameter.const_data_ptr());
    for (std::size_t i = 0; i < parameter.nbytes(); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  }
  return hash;
}

int main(int argc, char** argv) {
  const std::uint64_t steps = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500;
  try {
    const auto world = lockstep::init({.join = false});
    torch::manual_seed(1);
    Net net;
    lockstep::elastic::Shared state(net, lockstep::Adam({.lr = 1e-3}));
    const auto end = lockstep::elastic::run(world, state, [&](auto& model) {
      if (state.step() == steps) return false;
      model.step([&](int virtual_rank) -> lockstep::VirtualLoss {
        const auto x = inputs(state.step(), virtual_rank);
        const auto loss = torch::mse_loss(net(x), torch::sin(x.sum(1, true)), at::Reduction::Sum);
        loss.backward();
        return {loss.item<double>(), double(x.size(0))};
      });
      return true;
    });
    if (end == lockstep::elastic::End::done && world.rank() == 0)
      std::printf("%llu steps on %d workers, generation %llu: weights %016llx\n",
                  static_cast<unsigned long long>(state.step()), world.size(),
                  static_cast<unsigned long long>(world.generation()),
                  static_cast<unsigned long long>(hash_of(*net)));
  } catch (const lockstep::Error& error) {
    std::fprintf(stderr, "example-elastic: %s\n", error.what());
    return 1;
  }
}
