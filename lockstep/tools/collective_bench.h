// What `lockstep bench collective` measures: sizes as a user writes them, the operations with what
// they move and what they must give, times, and the lines that come out. Sizes and bandwidths mean
// what they mean in nccl-tests (its doc/PERFORMANCE.md). Stateless; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/dtype.h"
#include "lockstep/collective/group.h"

namespace lockstep {

// "16K" is 16,384: a number, or one with K, M or G. Throws ConfigError.
std::uint64_t parse_size(std::string_view text);

struct BenchCase {
  Dtype dtype = Dtype::float32;
  Reduction reduction = Reduction::sum;
  int ranks = 1;
  int rank = 0;
  std::uint64_t count = 0;  // elements of the whole: nccl-tests' size divided by the dtype's

  std::uint64_t bytes() const { return count * size_of(dtype); }
  std::uint64_t part() const { return count / ranks; }
};

enum class Extent { none, part, whole };  // part: the whole divided by the number of ranks

struct BenchOperation {
  std::string_view name;
  Extent input;   // none: in place
  Extent output;  // what an in-place operation reads, too
  double (*bus_factor)(int ranks);
  void (*call)(Group& group, const BenchCase& c, std::span<const std::byte> input,
               std::span<std::byte> output);
  // Element i of the output when every rank filled its input with bench_value(); NaN: unspecified.
  double (*expected)(const BenchCase& c, std::uint64_t i);
};

std::span<const BenchOperation> bench_operations();
// Throws ConfigError with the nearest name as its hint.
const BenchOperation& bench_operation(std::string_view name);
// `size` bytes, rounded down to whole elements, as many on each rank where the operation divides
// them. Throws ConfigError where nothing is left.
BenchCase bench_case(const BenchOperation& operation, Dtype dtype, Reduction reduction, int ranks,
                     std::uint64_t size);
std::size_t bytes_of(Extent extent, const BenchCase& c);

// Small integers: their sums and products are exact in every dtype.
double bench_value(int rank, std::uint64_t i);
void fill(std::span<std::byte> memory, Dtype dtype, int rank);
// Throws Error naming the first element that is not what it must be.
void check(const BenchOperation& operation, const BenchCase& c, std::span<const std::byte> output);

// Calls timed together, so that reading the clock takes no part: more when they are small.
std::uint64_t calls_in_batch(std::uint64_t bytes);

struct Times {
  double median = 0, min = 0, p90 = 0, max = 0;
};
// Of one value or more.
Times summarize(std::vector<double> values);

struct BenchResult {
  std::string operation;
  int ranks = 1;
  std::uint64_t bytes = 0;
  std::uint64_t count = 0;
  Dtype dtype = Dtype::float32;
  bool arena = false;
  Times us;  // of one call, over the batches
  double bus_factor = 1;
  std::uint64_t iterations = 0;
  double moved_bytes = 0;  // by all ranks in one call, as the group counted; 0: not counted
};
double algorithm_gbps(const BenchResult& result);  // bytes / time, 1 GB = 10^9 bytes
std::string table_heading();
std::string table_row(const BenchResult& result);
std::string json_line(const BenchResult& result);

}  // namespace lockstep
