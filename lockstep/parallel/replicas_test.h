// For tests alone: ranks as threads that share one segment, small modules, and the sums of one
// process.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>
#include <unistd.h>

#include <barrier>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/cluster/world.h"
#include "lockstep/memory/segment.h"
#include "lockstep/parallel/data_parallel.h"

namespace lockstep {

// --- Ranks ---

// Runs every rank in a thread, on nodes with so many each, and rethrows the first rank's exception.
inline void run_nodes(const std::vector<int>& local_sizes,
                      const std::function<void(const World&)>& body,
                      Clock::duration timeout = std::chrono::seconds(60)) {
  const int size = std::accumulate(local_sizes.begin(), local_sizes.end(), 0);
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(size));
  std::vector<std::string> told(errors.size());
  std::barrier all_told(size);
  const Exchange exchange = [&](const Place& place, const std::string& text) {
    told[static_cast<std::size_t>(place.rank)] = text;
    all_told.arrive_and_wait();
    return told;
  };
  std::vector<std::shared_ptr<Segment>> segments;
  std::vector<std::thread> threads;
  for (const int local_size : local_sizes) {
    segments.push_back(Segment::create({.seats = local_size, .arena_bytes = 64 << 20}));
    for (int local_rank = 0; local_rank < local_size; ++local_rank)
      threads.emplace_back([&, local_size, local_rank, rank = static_cast<int>(threads.size()),
                            fd = ::dup(segments.back()->fd())] {
        try {
          Place place{.launcher = Launcher::lockstep, .rank = rank, .size = size};
          place.local_rank = local_rank;
          place.local_size = local_size;
          place.segment_fd = fd;
          place.job_id = "test";
          place.several_nodes = local_sizes.size() > 1;
          body(init_from(place, {.timeout = timeout, .exchange = exchange}));
        } catch (...) {
          errors[static_cast<std::size_t>(rank)] = std::current_exception();
        }
      });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

inline void run_ranks(int size, const std::function<void(const World&)>& body,
                      Clock::duration timeout = std::chrono::seconds(60)) {
  run_nodes({size}, body, timeout);
}

inline World alone() { return init_from({}, {}); }

// What `attempt` throws, or "no error".
template <typename Exception>
std::string message_of(const std::function<void()>& attempt) {
  try {
    attempt();
  } catch (const Exception& error) {
    return error.what();
  }
  return "no error";
}

// How gradients may travel: all at once, about each alone, the same while backward runs.
inline const DataParallelOptions kWays[] = {
    {}, {.bucket_cap_mb = 1e-4}, {.bucket_cap_mb = 1e-4, .overlap = true}};

// --- Modules and data ---

// Numbers that depend on seed and position alone; no shared random generator.
inline at::Tensor numbers(at::IntArrayRef shape, int seed) {
  const at::Tensor positions = at::arange(1, c10::multiply_integers(shape) + 1, at::kDouble);
  return (positions * (12.9898 + seed)).sin().mul(43758.5453).frac().to(at::kFloat).reshape(shape);
}

struct NetImpl : torch::nn::Module {
  explicit NetImpl(int seed) {
    first = register_module("first", torch::nn::Linear(7, 33));
    second = register_module("second", torch::nn::Linear(33, 3));
    const at::NoGradGuard no_grad;
    for (auto& parameter : parameters()) parameter.copy_(numbers(parameter.sizes(), seed) * 0.5);
  }
  at::Tensor forward(const at::Tensor& x) { return second(at::tanh(first(x))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Net);

inline at::Tensor inputs(int rank, int step, int rows = 6) {
  return numbers({rows, 7}, 100 * step + rank);
}
inline at::Tensor loss_of(const at::Tensor& output, int step) {
  return at::mse_loss(output, numbers(output.sizes(), 1000 + step));
}

inline std::vector<at::Tensor> values_of(torch::nn::Module& module) {
  std::vector<at::Tensor> values;
  for (const auto& parameter : module.parameters()) values.push_back(parameter.detach().clone());
  return values;
}
inline void expect_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i], b[i])) << "tensor " << i;
}

// What every rank has in the end, collected from the threads.
class Results {
 public:
  void put(int rank, std::vector<at::Tensor> values) {
    const std::lock_guard lock(mutex_);
    values_[rank] = std::move(values);
  }
  void expect_all(int ranks, const std::vector<at::Tensor>& expected) {
    ASSERT_EQ(values_.size(), static_cast<std::size_t>(ranks));
    for (const auto& [rank, values] : values_) {
      SCOPED_TRACE(testing::Message() << "rank " << rank);
      expect_equal(values, expected);
    }
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<at::Tensor>> values_;
};

// The canonical tree by hand.
inline at::Tensor tree_sum(const std::vector<at::Tensor>& g) {
  switch (g.size()) {
    case 1:
      return g[0];
    case 2:
      return g[0] + g[1];
    case 3:
      return (g[0] + g[1]) + g[2];
    default:
      return (g[0] + g[1]) + (g[2] + g[3]);
  }
}

}  // namespace lockstep
