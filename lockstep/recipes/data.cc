#include <fmt/format.h>

#include <utility>

#include "lockstep/base/error.h"
#include "lockstep/recipes/recipe.h"
#include "lockstep/recipes/text.h"

namespace lockstep {
namespace {

constexpr std::int64_t kImageClasses = 10;

Normalization normalization_for(const Job& job, const Dataset& train) {
  if (job.dataset.normalize == "none") return {};
  if (job.dataset.normalize == "unit") return {{0.0f}, {255.0f}};
  if (!train.bytes.empty()) return image_statistics(train);
  auto [mean, deviation] = feature_statistics(train);
  return {std::move(mean), std::move(deviation)};
}

TrainTest split_if_asked(const Job& job, Dataset data) {
  if (job.split.test > 0) return split_dataset(data, job.split.test, job.split.seed);
  return {std::move(data), {}};
}

// Without a split the folder's own test set is the test set; with one it is not even read.
TrainTest load_images(const Job& job) {
  const auto kept = [&](Dataset data) {
    return job.dataset.classes.empty() ? data : select_classes(data, job.dataset.classes);
  };
  if (job.split.test > 0)
    return split_if_asked(job, kept(load_idx_training(job.data, kImageClasses)));
  TrainTest sets = load_idx_folder(job.data, kImageClasses);
  return {kept(std::move(sets.train)), kept(std::move(sets.test))};
}

Partition partition_of(const Job& job, const Dataset& train) {
  Partition partition{.kind = partition_kind(job.dataset.partition)};
  using Kind = Partition::Kind;
  if (partition.kind == Kind::none || partition.kind == Kind::range) return partition;
  partition.keys = keys_of(train, job.dataset.partition_key, job.dataset.target);
  if (partition.kind == Kind::weighted)
    partition.weights = balancing_weights(std::exchange(partition.keys, {}));
  return partition;
}

}  // namespace

RecipeData load_recipe_data(const Job& job) {
  RecipeData loaded;
  if (job.recipe == "linear-regression") {
    LinearRegressionData made =
        make_linear_regression(static_cast<std::uint64_t>(job.dataset.rows), job.dataset.features,
                               job.dataset.noise, job.dataset.seed);
    loaded.known_weights = std::move(made.weights);
    loaded.known_bias = made.bias;
    loaded.sets = split_if_asked(job, std::move(made.data));
  } else if (job.recipe == "csv") {
    loaded.sets = split_if_asked(
        job, load_csv(job.data, {.target = job.dataset.target,
                                 .classification = job.dataset.task == "classification",
                                 .delimiter = job.dataset.delimiter[0],
                                 .features = {}}));
  } else if (job.recipe == "gpt") {
    loaded.sets = split_if_asked(
        job, load_text(job.data.empty() ? libtorch_headers()
                                        : std::vector<std::filesystem::path>{job.data},
                       job.model.context + 1));
  } else {
    loaded.sets = load_images(job);
  }
  Dataset& train = loaded.sets.train;
  if (job.dataset.keep_fraction < 1)
    train = thin_class(train, job.dataset.keep_class, job.dataset.keep_fraction, job.train.seed);
  loaded.partition = partition_of(job, train);
  loaded.normalization = normalization_for(job, loaded.sets.train);
  return loaded;
}

}  // namespace lockstep
