#include "lockstep/parallel/data_loader.h"

#include <fmt/format.h>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr int kMostWorkers = 1024;

std::uint64_t checked_step_size(std::uint64_t samples, std::uint64_t ranks,
                                const DataLoaderOptions& options) {
  if (options.batch_size == 0) throw ConfigError("make_data_loader: batch_size is 0");
  if (options.num_workers < 0 || options.num_workers > kMostWorkers)
    throw ConfigError(fmt::format("make_data_loader: num_workers {} is not from 0 to {}",
                                  options.num_workers, kMostWorkers));
  if (options.prefetch_factor == 0)
    throw ConfigError("make_data_loader: prefetch_factor is 0",
                      "1 or more; PyTorch's default is 2");
  if (samples == 0) throw ConfigError("make_data_loader: the data set is empty");
  if (samples < ranks)
    throw ConfigError(fmt::format("make_data_loader: {} samples for {} ranks", samples, ranks),
                      "use as many workers as there are samples, or fewer");
  const auto step_size = checked_multiply(options.batch_size, ranks);
  if (!step_size)
    throw ConfigError(
        fmt::format("make_data_loader: batch_size {} is out of range", options.batch_size));
  if (options.drop_last && *step_size > samples)
    throw ConfigError(
        fmt::format("make_data_loader: drop_last leaves no batch: {} samples, {} a step", samples,
                    *step_size),
        "make batch_size smaller, or drop_last false");
  return *step_size;
}

}  // namespace

SampleOrder::SampleOrder(std::uint64_t samples, int rank, int ranks,
                         const DataLoaderOptions& options)
    : samples_(samples),
      step_size_(checked_step_size(samples, static_cast<std::uint64_t>(ranks), options)),
      rank_(static_cast<std::uint64_t>(rank)),
      ranks_(static_cast<std::uint64_t>(ranks)),
      steps_(samples / step_size_),
      ledger_({.samples = samples,
               .global_batch_size = step_size_,
               .virtual_ranks = ranks,
               .seed = options.seed,
               .shuffle = options.shuffle,
               .partition = options.partition}) {
  if (ledger_.by_virtual_rank()) {
    steps_ = ledger_.steps_per_epoch();
    return;
  }
  const std::uint64_t remainder = samples % step_size_;
  if (options.drop_last)
    samples_ -= remainder;
  else if (remainder >= ranks_)
    ++steps_;  // a short step of its own; a smaller remainder joins the last whole step
}

PositionRange SampleOrder::positions(std::uint64_t step) const {
  if (ledger_.by_virtual_rank()) return ledger_.positions(step, static_cast<int>(rank_));
  const std::uint64_t begin = step * step_size_;
  const std::uint64_t end = step + 1 == steps_ ? samples_ : begin + step_size_;
  const PositionRange part = even_part(end - begin, ranks_, rank_);
  return {begin + part.begin, begin + part.end};
}

std::vector<std::size_t> SampleOrder::indices(const Ledger::Epoch& epoch,
                                              std::uint64_t step) const {
  const PositionRange range = positions(step);
  std::vector<std::size_t> indices;
  indices.reserve(range.size());
  for (std::uint64_t position = range.begin; position < range.end; ++position)
    indices.push_back(epoch.index(position));
  return indices;
}

std::uint64_t known_size(std::optional<std::size_t> size) {
  if (!size)
    throw ConfigError("make_data_loader: the data set does not know its size",
                      "use a map-style data set, one with size() and get()");
  return *size;
}

}  // namespace lockstep
