#include "lockstep/train/batches.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

// The two row kernels; the compiler vectorises them for the machine it finds at run time.
#define LOCKSTEP_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))

LOCKSTEP_CLONES void normalize_bytes(const std::uint8_t* __restrict in,
                                     const float* __restrict mean, const float* __restrict scale,
                                     std::int64_t count, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i)
    out[i] = (static_cast<float>(in[i]) - mean[i]) * scale[i];
}

LOCKSTEP_CLONES void normalize_values(const float* __restrict in, const float* __restrict mean,
                                      const float* __restrict scale, std::int64_t count,
                                      float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = (in[i] - mean[i]) * scale[i];
}

std::vector<float> one_for_each(const std::vector<float>& values, std::int64_t features) {
  if (values.size() == 1) return std::vector<float>(static_cast<std::size_t>(features), values[0]);
  LOCKSTEP_CHECK(values.size() == static_cast<std::size_t>(features), "one value for each feature");
  return values;
}

}  // namespace

Normalization image_statistics(const Dataset& images) {
  std::array<std::uint64_t, 256> histogram{};
  for (std::uint8_t byte : images.bytes) ++histogram[byte];
  double count = 0, sum = 0, squares = 0;
  for (std::size_t value = 0; value < histogram.size(); ++value) {
    const double times = static_cast<double>(histogram[value]);
    const double byte = static_cast<double>(value);
    count += times;
    sum += times * byte;
    squares += times * byte * byte;
  }
  if (count == 0) return {};
  const double mean = sum / count;
  const double variance = squares / count - mean * mean;
  return {{static_cast<float>(mean)},
          {variance > 0 ? static_cast<float>(std::sqrt(variance)) : 1.0f}};
}

DatasetBatches::DatasetBatches(const Dataset& data, Normalization normalization, TargetForm form)
    : data_(data),
      mean_(one_for_each(normalization.mean, data.sample_size())),
      scale_(one_for_each(normalization.deviation, data.sample_size())),
      form_(form) {
  for (float& deviation : scale_) deviation = 1.0f / deviation;
}

Batch DatasetBatches::batch(std::span<const std::uint64_t> indices) const {
  const std::int64_t features = data_.sample_size();
  std::vector<std::int64_t> shape = {static_cast<std::int64_t>(indices.size())};
  if (!data_.bytes.empty()) shape.push_back(1);
  shape.insert(shape.end(), data_.sample_shape.begin(), data_.sample_shape.end());
  Batch batch;
  batch.input = at::empty(shape, at::kFloat);
  float* out = batch.input.mutable_data_ptr<float>();
  for (std::uint64_t index : indices) {
    LOCKSTEP_CHECK(index < data_.rows);
    const std::size_t begin = index * static_cast<std::size_t>(features);
    if (data_.bytes.empty())
      normalize_values(data_.values.data() + begin, mean_.data(), scale_.data(), features, out);
    else
      normalize_bytes(data_.bytes.data() + begin, mean_.data(), scale_.data(), features, out);
    out += features;
  }
  if (!data_.classes.empty() || !data_.targets.empty()) batch.target = targets(indices);
  return batch;
}

at::Tensor DatasetBatches::targets(std::span<const std::uint64_t> indices) const {
  const auto rows = static_cast<std::int64_t>(indices.size());
  if (form_ == TargetForm::classes) {
    at::Tensor target = at::empty({rows}, at::kLong);
    std::int64_t* out = target.mutable_data_ptr<std::int64_t>();
    for (std::uint64_t index : indices) *out++ = data_.classes[index];
    return target;
  }
  const std::int64_t columns = form_ == TargetForm::one_hot ? data_.class_count : 1;
  at::Tensor target = at::zeros({rows, columns}, at::kFloat);
  float* out = target.mutable_data_ptr<float>();
  for (std::uint64_t index : indices) {
    if (form_ == TargetForm::one_hot)
      out[data_.classes[index]] = 1.0f;
    else
      *out = form_ == TargetForm::values ? data_.targets[index]
                                         : (data_.classes[index] == 1 ? 1.0f : -1.0f);
    out += columns;
  }
  return target;
}

}  // namespace lockstep
