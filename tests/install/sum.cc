// Every worker adds its rank; no libtorch.
#include <lockstep/core.h>

#include <cstdio>
#include <span>

int main() {
  lockstep::World world = lockstep::init();
  float sum = static_cast<float>(world.rank());
  world.group().all_reduce(std::as_writable_bytes(std::span(&sum, 1)), lockstep::Dtype::float32,
                           lockstep::Reduction::sum);
  std::printf("%d workers, sum of ranks %g\n", world.size(), sum);
}
