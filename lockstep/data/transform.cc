#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/data/dataset.h"
#include "lockstep/data/ledger.h"
#include "lockstep/job/nearest.h"

namespace lockstep {
namespace {

// The given rows of one of a data set's arrays, `width` elements each; an empty array stays empty.
template <typename T>
std::vector<T> gather(const std::vector<T>& from, const std::vector<std::uint64_t>& rows,
                      std::size_t width) {
  std::vector<T> result;
  if (from.empty()) return result;
  result.reserve(rows.size() * width);
  for (const std::uint64_t row : rows) {
    const T* first = from.data() + row * width;
    result.insert(result.end(), first, first + width);
  }
  return result;
}

Dataset take_rows(const Dataset& data, const std::vector<std::uint64_t>& rows) {
  const auto width = static_cast<std::size_t>(data.sample_size());
  Dataset result;
  result.source = data.source;
  result.sample_shape = data.sample_shape;
  result.bytes = gather(data.bytes, rows, width);
  result.values = gather(data.values, rows, width);
  result.classes = gather(data.classes, rows, 1);
  result.targets = gather(data.targets, rows, 1);
  result.rows = rows.size();
  result.class_count = data.class_count;
  result.feature_names = data.feature_names;
  return result;
}

// Which of `count` are chosen: round(fraction * count), from 1 to `most`, by a keyed permutation.
std::vector<bool> choose(std::uint64_t count, double fraction, std::uint64_t most,
                         std::uint64_t key) {
  const double wanted = std::round(fraction * static_cast<double>(count));
  const auto number = std::clamp<std::uint64_t>(static_cast<std::uint64_t>(wanted), 1, most);
  const Permutation permutation(count, key);
  std::vector<bool> chosen(count);
  for (std::uint64_t i = 0; i < number; ++i) chosen[permutation(i)] = true;
  return chosen;
}

// Sums of a byte and of its square fit 32 bits for this many rows; then they go to 64 bits.
constexpr std::uint64_t kRowsPerBlock = 65536;
static_assert(kRowsPerBlock * 255 * 255 < (std::uint64_t{1} << 32));

void moments_of_bytes(const Dataset& data, std::vector<double>& mean,
                      std::vector<double>& variance) {
  const std::size_t width = mean.size();
  std::vector<std::uint64_t> sums(width), squares(width);
  std::vector<std::uint32_t> block_sums(width), block_squares(width);
  const std::uint8_t* row = data.bytes.data();
  for (std::uint64_t begin = 0; begin < data.rows; begin += kRowsPerBlock) {
    std::fill(block_sums.begin(), block_sums.end(), 0);
    std::fill(block_squares.begin(), block_squares.end(), 0);
    const std::uint64_t end = std::min(data.rows, begin + kRowsPerBlock);
    for (std::uint64_t i = begin; i < end; ++i, row += width) {
      for (std::size_t j = 0; j < width; ++j) {
        const std::uint32_t value = row[j];
        block_sums[j] += value;
        block_squares[j] += value * value;
      }
    }
    for (std::size_t j = 0; j < width; ++j)
      sums[j] += block_sums[j], squares[j] += block_squares[j];
  }
  const auto rows = static_cast<double>(data.rows);
  for (std::size_t j = 0; j < width; ++j) {
    mean[j] = static_cast<double>(sums[j]) / rows;
    variance[j] = std::max(0.0, static_cast<double>(squares[j]) / rows - mean[j] * mean[j]);
  }
}

void moments_of_values(const Dataset& data, std::vector<double>& mean,
                       std::vector<double>& variance) {
  const std::size_t width = mean.size();
  const auto rows = static_cast<double>(data.rows);
  const float* const end = data.values.data() + data.values.size();
  for (const float* row = data.values.data(); row != end; row += width)
    for (std::size_t j = 0; j < width; ++j) mean[j] += row[j];
  for (double& value : mean) value /= rows;
  for (const float* row = data.values.data(); row != end; row += width) {
    for (std::size_t j = 0; j < width; ++j) {
      const double distance = row[j] - mean[j];
      variance[j] += distance * distance;
    }
  }
  for (double& value : variance) value /= rows;
}

}  // namespace

Dataset select_classes(const Dataset& data, const std::vector<std::int64_t>& classes) {
  std::vector<std::int64_t> new_name(static_cast<std::size_t>(data.class_count), -1);
  for (std::size_t i = 0; i < classes.size(); ++i) {
    if (classes[i] < 0 || classes[i] >= data.class_count)
      throw ConfigError(data.source + ": there is no class " + std::to_string(classes[i]),
                        "classes are 0 to " + std::to_string(data.class_count - 1));
    new_name[static_cast<std::size_t>(classes[i])] = static_cast<std::int64_t>(i);
  }
  const auto renamed = [&](std::int64_t c) { return new_name[static_cast<std::size_t>(c)]; };
  std::vector<std::uint64_t> rows;
  for (std::uint64_t row = 0; row < data.classes.size(); ++row)
    if (renamed(data.classes[row]) >= 0) rows.push_back(row);
  if (rows.empty()) throw ConfigError(data.source + ": no row is of one of the chosen classes");
  Dataset result = take_rows(data, rows);
  for (std::int64_t& c : result.classes) c = renamed(c);
  result.class_count = static_cast<std::int64_t>(classes.size());
  return result;
}

Dataset thin_class(const Dataset& data, std::int64_t class_number, double fraction,
                   std::uint64_t seed) {
  const auto count = static_cast<std::uint64_t>(std::ranges::count(data.classes, class_number));
  if (count == 0)
    throw ConfigError(data.source + ": there is no row of class " + std::to_string(class_number),
                      "dataset.keep_class is 0 to " + std::to_string(data.class_count - 1));
  const auto kept = choose(count, fraction, count, mix({seed, 0x7468696e}));  // "thin"
  std::vector<std::uint64_t> rows;
  for (std::uint64_t row = 0, seen = 0; row < data.rows; ++row)
    if (data.classes[row] != class_number || kept[seen++]) rows.push_back(row);
  return take_rows(data, rows);
}

std::vector<std::uint64_t> keys_of(const Dataset& data, const std::string& column,
                                   const std::string& target) {
  std::vector<std::uint64_t> keys(data.rows);
  const auto key = [](float value) {  // 0 and -0 are one
    return std::uint64_t{std::bit_cast<std::uint32_t>(value == 0 ? 0.0f : value)};
  };
  if (column.empty() || (column == target && !data.classes.empty())) {
    LOCKSTEP_CHECK(data.classes.size() == data.rows);
    std::ranges::copy(data.classes, keys.begin());
  } else if (column == target) {
    std::ranges::transform(data.targets, keys.begin(), key);
  } else {
    const auto found = std::ranges::find(data.feature_names, column);
    if (found == data.feature_names.end()) {
      std::vector<std::string> names = data.feature_names;
      names.push_back(target);
      const std::string near = nearest(column, names);
      throw ConfigError(data.source + ": there is no column " + column,
                        near.empty() ? "one of its header" : "did you mean " + near + "?");
    }
    const auto width = static_cast<std::size_t>(data.sample_size());
    const auto at = static_cast<std::size_t>(found - data.feature_names.begin());
    for (std::uint64_t row = 0; row < data.rows; ++row)
      keys[row] = key(data.values[row * width + at]);
  }
  return keys;
}

TrainTest split_dataset(const Dataset& data, double test_fraction, std::uint64_t seed) {
  if (test_fraction <= 0) return {.train = data, .test = {}};
  if (data.rows < 2)
    throw ConfigError(data.source + ": " + std::to_string(data.rows) +
                          " row cannot be split into a training and a test set",
                      "more rows, or split.test = 0");
  const auto held_out =
      choose(data.rows, test_fraction, data.rows - 1, mix({seed, 0x73706c6974}));  // "split"
  std::vector<std::uint64_t> train, test;
  for (std::uint64_t row = 0; row < data.rows; ++row) (held_out[row] ? test : train).push_back(row);
  return {.train = take_rows(data, train), .test = take_rows(data, test)};
}

std::pair<std::vector<float>, std::vector<float>> feature_statistics(const Dataset& data) {
  const auto width = static_cast<std::size_t>(data.sample_size());
  std::vector<double> mean(width), variance(width);
  if (data.rows > 0 && !data.bytes.empty()) moments_of_bytes(data, mean, variance);
  if (data.rows > 0 && !data.values.empty()) moments_of_values(data, mean, variance);
  std::vector<float> deviation(width);
  for (std::size_t j = 0; j < width; ++j) {
    const auto root = static_cast<float>(std::sqrt(variance[j]));
    deviation[j] = root > 0 ? root : 1.0f;
  }
  return {std::vector<float>(mean.begin(), mean.end()), std::move(deviation)};
}

}  // namespace lockstep
