// A worker for tests: joins whatever job it was started in, adds the ranks up, and goes wrong on
// request.
//
//   cluster_worker sum            prints rank, size, launcher and the sum of all ranks
//   cluster_worker crash RANK     that rank kills itself, the others wait for it
//   cluster_worker hang RANK      that rank never comes
//   cluster_worker mismatch       rank 0 adds four numbers, the others eight
//   cluster_worker exit RANK CODE that rank ends before joining
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <iostream>
#include <span>
#include <string>

#include "lockstep/base/error.h"
#include "lockstep/cluster/world.h"

namespace {

using namespace lockstep;

float sum_of_ranks(const World& world, std::size_t count) {
  std::array<float, 8> values{};
  values.fill(static_cast<float>(world.rank()));
  world.group().all_reduce(std::as_writable_bytes(std::span(values).first(count)), Dtype::float32,
                           Reduction::sum, {.tag = "ranks"});
  return values[0];
}

int work(const std::string& mode, int victim, int code) {
  const Place place = place_from(process_environment());
  if (mode == "exit" && place.rank == victim) return code;
  const World world = init({.timeout = std::chrono::seconds(mode == "hang" ? 1 : 60)});
  world.group().barrier();
  if (world.rank() == victim && mode == "crash") ::kill(::getpid(), SIGKILL);
  if (world.rank() == victim && mode == "hang")
    for (;;) ::pause();
  const float sum = sum_of_ranks(world, mode == "mismatch" && world.rank() == 0 ? 4 : 8);
  std::cout << fmt::format("rank {} of {} by {}: sum {}\n", world.rank(), world.size(),
                           name_of(world.place().launcher), sum);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return work(argc > 1 ? argv[1] : "sum", argc > 2 ? std::atoi(argv[2]) : -1,
                argc > 3 ? std::atoi(argv[3]) : 0);
  } catch (const std::exception& error) {
    std::cerr << "failed: " << error.what() << '\n';
    return 1;
  }
}
