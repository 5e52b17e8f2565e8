// A worker for tests: joins whatever job it was started in, adds the ranks up, and goes wrong on
// request.
//
//   cluster_worker sum            prints rank, size, launcher and the sum of all ranks
//   cluster_worker fast           the same of 4 MB, by whichever plan is the fastest
//   cluster_worker crash RANK     that rank kills itself, the others wait for it
//   cluster_worker kill RANK      it is killed while it waits in all_reduce, by the next rank
//   cluster_worker hang RANK      that rank never comes
//   cluster_worker stop RANK      that rank stops itself by a signal
//   cluster_worker mismatch       rank 0 adds four numbers, the others eight
//   cluster_worker memory BYTES   each rank allocates as much in its arena
//   cluster_worker exit RANK CODE that rank ends before joining
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <iostream>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/cluster/world.h"
#include "lockstep/collective/operation_record.h"
#include "lockstep/memory/control_block.h"

namespace {

using namespace lockstep;

float sum_of_ranks(const World& world, std::size_t count) {
  std::array<float, 8> values{};
  values.fill(static_cast<float>(world.rank()));
  world.group().all_reduce(std::as_writable_bytes(std::span(values).first(count)), Dtype::float32,
                           Reduction::sum, {.tag = "ranks"});
  return values[0];
}

// Sends SIGKILL to a rank that waits for this one, and never comes itself.
void kill_in_all_reduce(Segment& segment, int victim) {
  const auto waits = [&] {
    const auto operations = recorded_operations(segment, victim);
    return !operations.empty() && operations.back().state == OperationState::open &&
           operations.back().call.tag == "ranks";
  };
  while (!waits()) std::this_thread::yield();
  ::kill(segment.control(victim).pid.load(), SIGKILL);
  for (;;) ::pause();
}

int work(const std::string& mode, const char* argument, int code) {
  const int victim = std::atoi(argument);
  const Place place = place_from(process_environment());
  if (mode == "exit" && place.rank == victim) return code;
  const bool late = mode == "hang" || mode == "stop";
  const World world =
      init({.timeout = std::chrono::seconds(late ? 2 : 60), .exact = mode != "fast"});
  world.group().barrier({.tag = "start"});
  if (mode == "memory")
    world.group().allocate(std::strtoull(argument, nullptr, 10), "the test's data");
  if (mode == "kill" && world.rank() == victim + 1) kill_in_all_reduce(*world.segment(), victim);
  if (world.rank() == victim && mode == "crash") ::kill(::getpid(), SIGKILL);
  if (world.rank() == victim && mode == "stop") ::kill(::getpid(), SIGSTOP);
  if (world.rank() == victim && mode == "hang")
    for (;;) ::pause();
  if (mode == "fast") {
    std::vector<float> much(1 << 20, 1);
    for (int i = 0; i < 2; ++i)  // told of once
      world.group().all_reduce(std::as_writable_bytes(std::span(much)), Dtype::float32,
                               Reduction::mean, {.tag = "much"});
    if (much.front() != 1 || much.back() != 1) return 1;
  }
  const float sum = sum_of_ranks(world, mode == "mismatch" && world.rank() == 0 ? 4 : 8);
  std::cout << fmt::format("rank {} of {} by {}: sum {}\n", world.rank(), world.size(),
                           name_of(world.place().launcher), sum);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return work(argc > 1 ? argv[1] : "sum", argc > 2 ? argv[2] : "-1",
                argc > 3 ? std::atoi(argv[3]) : 0);
  } catch (const std::exception& error) {
    std::cerr << "failed: " << error.what() << '\n';
    return 1;
  }
}
