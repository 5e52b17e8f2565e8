// A torch-free Dataset as batches of tensors: rows gathered by index, features normalised, targets
// shaped for the loss. Immutable once made; any thread may ask for batches.
#pragma once

#include <vector>

#include "lockstep/data/dataset.h"
#include "lockstep/train/task.h"

namespace lockstep {

// feature' = (feature - mean) / deviation; one entry for all features, or one for each.
struct Normalization {
  std::vector<float> mean = {0.0f};
  std::vector<float> deviation = {1.0f};
};
// One mean and deviation over all bytes of the images.
Normalization image_statistics(const Dataset& images);

// Random changes to training images, the same for a sample in an epoch wherever it is computed.
struct Augmentation {
  bool flip = false;  // left to right, one in two
  bool crop = false;  // moved by up to an eighth of height and width; what moves in is black
  std::uint64_t seed = 0;
  bool any() const { return flip || crop; }
};

enum class TargetForm {
  classes,  // [n] int64
  one_hot,  // [n, class_count] float32
  signs,    // [n, 1] float32: class 0 is -1, class 1 is +1
  values,   // [n, 1] float32
};

class DatasetBatches : public BatchSource {
 public:
  // `data` must outlive this. Images get a channel: [n, 1, height, width]; tables are [n, columns].
  DatasetBatches(const Dataset& data, Normalization normalization, TargetForm form,
                 Augmentation augmentation = {});
  std::uint64_t size() const override { return data_.rows; }
  Batch batch(std::span<const std::uint64_t> indices) const override;
  Batch training_batch(std::span<const std::uint64_t> indices, std::uint64_t epoch) const override;

 private:
  Batch make(std::span<const std::uint64_t> indices, const std::uint64_t* epoch) const;
  at::Tensor targets(std::span<const std::uint64_t> indices) const;

  const Dataset& data_;
  std::vector<float> mean_;   // one for each feature
  std::vector<float> scale_;  // 1 / deviation
  TargetForm form_;
  Augmentation augmentation_;
};

}  // namespace lockstep
