// torch::data's map-style data sets as a BatchSource. Any thread that the data set allows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/stack.h>

#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/train/task.h"

namespace lockstep {

// Holds a copy of the data set. A sample must follow from its index alone.
template <typename Dataset>
class MapBatches : public BatchSource {
 public:
  explicit MapBatches(Dataset dataset) : dataset_(std::move(dataset)) {
    const std::optional<std::size_t> size = dataset_.size();
    if (!size)
      throw ConfigError("the data set does not know its size",
                        "data sets of torch::data's map style do");
    size_ = *size;
  }
  std::uint64_t size() const override { return size_; }

  Batch batch(std::span<const std::uint64_t> indices) const override {
    if constexpr (requires { dataset_.get(std::size_t{}); }) {
      std::vector<at::Tensor> inputs, targets;
      for (const std::uint64_t index : indices) {
        auto example = dataset_.get(static_cast<std::size_t>(index));
        inputs.push_back(std::move(example.data));
        targets.push_back(std::move(example.target));
      }
      return {at::stack(inputs), at::stack(targets)};
    } else {
      auto batch = dataset_.get_batch(std::vector<std::size_t>(indices.begin(), indices.end()));
      return {std::move(batch.data), std::move(batch.target)};
    }
  }

 private:
  mutable Dataset dataset_;  // torch::data's get() is not const
  std::uint64_t size_ = 0;
};

// A BatchSource as it is, anything else in a MapBatches that lives as long as the expression.
template <typename Data>
class BatchSourceOf {
 public:
  explicit BatchSourceOf(const Data& data) : source_(data) {}
  operator const BatchSource&() const { return source_; }

 private:
  std::conditional_t<std::derived_from<Data, BatchSource>, const Data&, MapBatches<Data>> source_;
};

}  // namespace lockstep
