#include "lockstep/train/batches.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

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

// The image `in` of `height` rows, flipped and moved.
void augment(std::span<const std::uint8_t> in, std::int64_t height, std::int64_t width,
             const Augmentation& how, std::uint64_t random, std::span<std::uint8_t> out) {
  const bool flip = how.flip && (random & 1) != 0;
  // Uniform in -size / 8 … size / 8, rounded up: 4 pixels of 28 or 32.
  const auto offset = [&](std::int64_t size, int bits) {
    const std::int64_t most = how.crop ? (size + 7) / 8 : 0;
    return static_cast<std::int64_t>((random >> bits & 0xffffff) %
                                     static_cast<std::uint64_t>(2 * most + 1)) -
           most;
  };
  const std::int64_t down = offset(height, 8), right = offset(width, 36);
  for (std::int64_t y = 0; y < height; ++y)
    for (std::int64_t x = 0; x < width; ++x) {
      const std::int64_t from_y = y - down, moved = x - right;
      const std::int64_t from_x = flip ? width - 1 - moved : moved;
      const bool inside = from_y >= 0 && from_y < height && moved >= 0 && moved < width;
      out[static_cast<std::size_t>(y * width + x)] =
          inside ? in[static_cast<std::size_t>(from_y * width + from_x)] : std::uint8_t{0};
    }
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

DatasetBatches::DatasetBatches(const Dataset& data, Normalization normalization, TargetForm form,
                               Augmentation augmentation)
    : data_(data),
      mean_(one_for_each(normalization.mean, data.sample_size())),
      scale_(one_for_each(normalization.deviation, data.sample_size())),
      form_(form),
      augmentation_(augmentation) {
  LOCKSTEP_CHECK(!augmentation.any() || (!data.bytes.empty() && data.sample_shape.size() == 2),
                 "augmentation is for images");
  for (float& deviation : scale_) deviation = 1.0f / deviation;
}

Batch DatasetBatches::batch(std::span<const std::uint64_t> indices) const {
  return make(indices, nullptr);
}

Batch DatasetBatches::training_batch(std::span<const std::uint64_t> indices,
                                     std::uint64_t epoch) const {
  return make(indices, augmentation_.any() ? &epoch : nullptr);
}

// `epoch`: augmented as in that one; null: as they are.
Batch DatasetBatches::make(std::span<const std::uint64_t> indices,
                           const std::uint64_t* epoch) const {
  const std::int64_t features = data_.sample_size();
  std::vector<std::int64_t> shape = {static_cast<std::int64_t>(indices.size())};
  if (!data_.bytes.empty()) shape.push_back(1);
  shape.insert(shape.end(), data_.sample_shape.begin(), data_.sample_shape.end());
  Batch batch;
  batch.input = at::empty(shape, at::kFloat);
  float* out = batch.input.mutable_data_ptr<float>();
  std::vector<std::uint8_t> augmented(epoch != nullptr ? static_cast<std::size_t>(features) : 0);
  for (std::uint64_t index : indices) {
    LOCKSTEP_CHECK(index < data_.rows);
    const std::size_t begin = index * static_cast<std::size_t>(features);
    if (data_.bytes.empty()) {
      normalize_values(data_.values.data() + begin, mean_.data(), scale_.data(), features, out);
    } else {
      const std::uint8_t* image = data_.bytes.data() + begin;
      if (epoch != nullptr) {
        augment({image, augmented.size()}, data_.sample_shape[0], data_.sample_shape[1],
                augmentation_, mix({augmentation_.seed, 0x61756d65, *epoch, index}), augmented);
        image = augmented.data();
      }
      normalize_bytes(image, mean_.data(), scale_.data(), features, out);
    }
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
