#include "lockstep/tools/collective_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/collective/kernels.h"
#include "lockstep/job/nearest.h"

namespace lockstep {
namespace {

constexpr double kUnspecified = std::numeric_limits<double>::quiet_NaN();

double one(int) { return 1; }
double all_but_mine(int ranks) { return (ranks - 1.0) / ranks; }
double twice_all_but_mine(int ranks) { return 2 * all_but_mine(ranks); }

// Element i of all ranks' values, combined.
double reduced(const BenchCase& c, std::uint64_t i) {
  double value = bench_value(0, i);
  for (int rank = 1; rank < c.ranks; ++rank) {
    const double other = bench_value(rank, i);
    if (c.reduction == Reduction::min)
      value = std::min(value, other);
    else if (c.reduction == Reduction::max)
      value = std::max(value, other);
    else
      value = c.reduction == Reduction::product ? value * other : value + other;
  }
  if (c.reduction != Reduction::mean) return value;
  return is_floating_point(c.dtype) ? value / c.ranks : std::trunc(value / c.ranks);
}

double gathered(const BenchCase& c, std::uint64_t i) {
  return bench_value(static_cast<int>(i / c.part()), i % c.part());
}

void send_recv(Group& group, const BenchCase& c, std::span<const std::byte> input,
               std::span<std::byte> output) {
  if (c.ranks == 1) return;
  const int next = (c.rank + 1) % c.ranks, before = (c.rank + c.ranks - 1) % c.ranks;
  // A send returns when its data is received: not all may send first.
  if (c.rank % 2 == 0) group.send(input, c.dtype, next);
  group.recv(output, c.dtype, before);
  if (c.rank % 2 != 0) group.send(input, c.dtype, next);
}

using In = std::span<const std::byte>;
using Out = std::span<std::byte>;

// As BenchOperation's members: name, input, output, bus_factor, call, expected.
constexpr BenchOperation kOperations[] = {
    {"all_reduce", Extent::none, Extent::whole, twice_all_but_mine,
     [](Group& g, const BenchCase& c, In, Out out) { g.all_reduce(out, c.dtype, c.reduction); },
     reduced},
    {"broadcast", Extent::none, Extent::whole, one,
     [](Group& g, const BenchCase& c, In, Out out) { g.broadcast(out, c.dtype, 0); },
     [](const BenchCase&, std::uint64_t i) { return bench_value(0, i); }},
    {"all_gather", Extent::part, Extent::whole, all_but_mine,
     [](Group& g, const BenchCase& c, In in, Out out) { g.all_gather(in, out, c.dtype); },
     gathered},
    {"reduce_scatter", Extent::whole, Extent::part, all_but_mine,
     [](Group& g, const BenchCase& c, In in, Out out) {
       g.reduce_scatter(in, out, c.dtype, c.reduction);
     },
     [](const BenchCase& c, std::uint64_t i) { return reduced(c, c.rank * c.part() + i); }},
    {"reduce", Extent::none, Extent::whole, one,
     [](Group& g, const BenchCase& c, In, Out out) { g.reduce(out, c.dtype, c.reduction, 0); },
     [](const BenchCase& c, std::uint64_t i) {
       return c.rank == 0 ? reduced(c, i) : bench_value(c.rank, i);
     }},
    {"gather", Extent::part, Extent::whole, all_but_mine,
     [](Group& g, const BenchCase& c, In in, Out out) {
       g.gather(in, c.rank == 0 ? out : out.first(0), c.dtype, 0);
     },
     [](const BenchCase& c, std::uint64_t i) {
       return c.rank == 0 ? gathered(c, i) : kUnspecified;
     }},
    {"scatter", Extent::whole, Extent::part, all_but_mine,
     [](Group& g, const BenchCase& c, In in, Out out) {
       g.scatter(c.rank == 0 ? in : in.first(0), out, c.dtype, 0);
     },
     [](const BenchCase& c, std::uint64_t i) { return bench_value(0, c.rank * c.part() + i); }},
    {"all_to_all", Extent::whole, Extent::whole, all_but_mine,
     [](Group& g, const BenchCase& c, In in, Out out) { g.all_to_all(in, out, c.dtype); },
     [](const BenchCase& c, std::uint64_t i) {
       return bench_value(static_cast<int>(i / c.part()), c.rank * c.part() + i % c.part());
     }},
    // To the next rank, from the one before.
    {"send_recv", Extent::whole, Extent::whole, one, send_recv,
     [](const BenchCase& c, std::uint64_t i) {
       return c.ranks == 1 ? kUnspecified : bench_value((c.rank + c.ranks - 1) % c.ranks, i);
     }},
    {"barrier", Extent::none, Extent::none, one,
     [](Group& g, const BenchCase&, In, Out) { g.barrier(); }, nullptr},
};

}  // namespace

std::uint64_t parse_size(std::string_view text) {
  std::uint64_t number = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, number);
  int shift = 0;
  if (error == std::errc() && end + 1 == last) {
    const auto unit = std::string_view("KMG").find(*end);
    shift = unit == std::string_view::npos ? -1 : static_cast<int>(unit + 1) * 10;
  } else if (error != std::errc() || end != last) {
    shift = -1;
  }
  if (shift < 0 || number == 0 || number > (std::uint64_t{1} << 50) >> shift)
    throw ConfigError(fmt::format("'{}' is no size in bytes", text),
                      "a number, or one with K, M or G for powers of 1024: 4,16K,26214400");
  return number << shift;
}

std::span<const BenchOperation> bench_operations() { return kOperations; }

const BenchOperation& bench_operation(std::string_view name) {
  std::vector<std::string> names;
  for (const BenchOperation& operation : kOperations) {
    if (operation.name == name) return operation;
    names.emplace_back(operation.name);
  }
  const std::string near = nearest(name, names);
  throw ConfigError(fmt::format("no operation '{}'", name),
                    near.empty() ? fmt::format("one of {}", fmt::join(names, ", "))
                                 : fmt::format("did you mean {}?", near));
}

BenchCase bench_case(const BenchOperation& operation, Dtype dtype, Reduction reduction, int ranks,
                     std::uint64_t size) {
  BenchCase c{.dtype = dtype, .reduction = reduction, .ranks = ranks};
  if (operation.output == Extent::none) return c;
  c.count = size / size_of(dtype);
  if (operation.input != Extent::none) c.count -= c.count % ranks;
  if (c.count == 0)
    throw ConfigError(
        fmt::format("{} of {} bytes: not one {} a rank", operation.name, size, name_of(dtype)),
        fmt::format("at least {} bytes for {} ranks", ranks * size_of(dtype), ranks));
  return c;
}

std::size_t bytes_of(Extent extent, const BenchCase& c) {
  if (extent == Extent::none) return 0;
  return (extent == Extent::part ? c.part() : c.count) * size_of(c.dtype);
}

double bench_value(int rank, std::uint64_t i) {
  return rank < 6 ? 1 + static_cast<double>((i + rank) % 2) : 1;
}

void fill(std::span<std::byte> memory, Dtype dtype, int rank) {
  const std::size_t element = size_of(dtype);
  for (std::uint64_t i = 0; i < memory.size() / element; ++i) {
    const auto value = static_cast<float>(bench_value(rank, i));
    kernels().round_from_float32(memory.data() + i * element, &value, dtype, 1);
  }
}

void check(const BenchOperation& operation, const BenchCase& c, std::span<const std::byte> output) {
  const std::size_t element = size_of(c.dtype);
  for (std::uint64_t i = 0; i < output.size() / element; ++i) {
    const double expected = operation.expected(c, i);
    float found = 0;
    kernels().widen_to_float32(&found, output.data() + i * element, c.dtype, 1);
    // Means are rounded to the dtype; everything else is exact.
    if (!std::isnan(expected) && !(std::abs(found - expected) <= 0.01 * std::abs(expected)))
      throw Error(fmt::format("{} gave a wrong result: element {} of {} on rank {} is {}, not {}",
                              operation.name, i, output.size() / element, c.rank, found, expected));
  }
}

std::uint64_t calls_in_batch(std::uint64_t bytes) {
  constexpr std::uint64_t kMost = 500, kBytes = 4 << 20;
  return bytes == 0 ? kMost : std::clamp<std::uint64_t>(kBytes / bytes, 1, kMost);
}

Times summarize(std::vector<double> values) {
  LOCKSTEP_CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return {.median = (values[(n - 1) / 2] + values[n / 2]) / 2,
          .min = values.front(),
          .p90 = values[(n * 9 + 9) / 10 - 1],
          .max = values.back()};
}

double algorithm_gbps(const BenchResult& result) {
  return result.us.median > 0 ? static_cast<double>(result.bytes) / (result.us.median * 1e3) : 0;
}

std::string table_heading() {
  return fmt::format("{:14} {:>5} {:>12} {:>12} {:>8} {:>9} {:>11} {:>11} {:>11} {:>8} {:>8}\n",
                     "operation", "ranks", "size B", "count", "dtype", "memory", "median us",
                     "min us", "p90 us", "algbw", "busbw");
}

std::string table_row(const BenchResult& result) {
  const bool sized = result.bytes != 0;
  const auto bandwidth = [&](double factor) {
    return sized ? fmt::format("{:.2f}", algorithm_gbps(result) * factor) : "";
  };
  return fmt::format(
      "{:14} {:>5} {:>12} {:>12} {:>8} {:>9} {:>11.3f} {:>11.3f} {:>11.3f} {:>8} {:>8}\n",
      result.operation, result.ranks, result.bytes, result.count,
      sized ? name_of(result.dtype) : "",
      !sized         ? ""
      : result.arena ? "arena"
                     : "ordinary",
      result.us.median, result.us.min, result.us.p90, bandwidth(1), bandwidth(result.bus_factor));
}

std::string json_line(const BenchResult& result) {
  const double gbps = algorithm_gbps(result);
  nlohmann::ordered_json line{{"operation", result.operation},
                              {"ranks", result.ranks},
                              {"bytes", result.bytes},
                              {"dtype", name_of(result.dtype)},
                              {"arena", result.arena},
                              {"time_us", result.us.median},
                              {"min_us", result.us.min},
                              {"p90_us", result.us.p90},
                              {"max_us", result.us.max},
                              {"algbw_gbps", gbps},
                              {"busbw_gbps", gbps * result.bus_factor},
                              {"iterations", result.iterations}};
  if (result.moved_bytes > 0) line["moved_bytes"] = result.moved_bytes;
  return line.dump() + "\n";
}

}  // namespace lockstep
