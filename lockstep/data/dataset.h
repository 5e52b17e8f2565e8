// A data set in memory, torch-free: rows of uint8 or float32 features and, for each row, a class or
// a float32 target. Immutable once made; any thread may read. `load_*` throw ConfigError naming the
// file and what is wrong.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace lockstep {

struct Dataset {
  std::string source;                      // for messages: the file or folder
  std::vector<std::int64_t> sample_shape;  // {28, 28} or {columns}
  // Exactly one of the two holds rows() * sample_size() elements.
  std::vector<std::uint8_t> bytes;
  std::vector<float> values;
  // At most one of the two holds rows() elements; both empty: no labels (prediction).
  std::vector<std::int64_t> classes;
  std::vector<float> targets;
  std::uint64_t rows = 0;
  std::int64_t class_count = 0;            // classes: 0 .. class_count - 1; 0 for regression
  std::vector<std::string> feature_names;  // csv: header names, else empty

  std::int64_t sample_size() const {
    std::int64_t size = 1;
    for (std::int64_t extent : sample_shape) size *= extent;
    return size;
  }
};

struct TrainTest {
  Dataset train;
  Dataset test;  // rows == 0: no test set
};

// --- IDX (the format of MNIST, http://yann.lecun.com/exdb/mnist), plain or gzip (".gz"). ---
struct IdxArray {
  std::vector<std::int64_t> shape;
  std::vector<std::uint8_t> bytes;  // element type must be unsigned byte (0x08)
};
// The name is for messages. Throws ConfigError: wrong magic, truncated, trailing bytes, absurd
// sizes.
IdxArray parse_idx(std::vector<std::uint8_t> content, const std::string& name);
// Reads PATH, or PATH.gz if only that exists; corrupt gzip is a ConfigError too.
IdxArray read_idx(const std::filesystem::path& path);
// train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-… in a folder. Labels >= class_count are a
// ConfigError naming file, row and value; so are counts that disagree.
TrainTest load_idx_folder(const std::filesystem::path& folder, std::int64_t class_count);
// Its training images alone; there need be no others.
Dataset load_idx_training(const std::filesystem::path& folder, std::int64_t class_count);
// Test images of a folder, or one IDX image file; labels when there are any. For prediction.
Dataset load_idx_images(const std::filesystem::path& folder_or_file);

// --- CSV: a header line, then numbers. ---
struct CsvOptions {
  std::string target = {};  // column name; may be absent from the file only when target_optional
  bool classification = false;  // targets are whole numbers 0 .. class_count - 1
  // For prediction. The column may also have gaps; a single empty cell, and it is as if absent.
  bool target_optional = false;
  char delimiter = ',';
  std::int64_t class_count = 0;            // 0: the largest class in the file + 1
  std::vector<std::string> features = {};  // empty: every column but the target; else in this order
};
// Throws ConfigError with file, line and column: ragged row, not a number, not finite, unknown
// target (with the nearest column as a hint), no rows.
Dataset parse_csv(const std::string& content, const std::string& name, const CsvOptions& options);
Dataset load_csv(const std::filesystem::path& path, const CsvOptions& options);

// --- Text: the bytes of files, one sample a block of `block` bytes that begins with the last byte
// of the one before, so that every byte but the first is once a target. --- A file, or the files of
// a folder and its folders in the order of their paths; several of either. Throws ConfigError:
// none, unreadable, less than one block, more than 1 GB.
Dataset load_text(const std::vector<std::filesystem::path>& places, std::int64_t block);

// --- Made up: y = x·w + bias + noise, x standard normal. Known weights for checking. ---
struct LinearRegressionData {
  Dataset data;
  std::vector<float> weights;
  float bias = 0;
};
LinearRegressionData make_linear_regression(std::uint64_t rows, std::int64_t features, double noise,
                                            std::uint64_t seed);

// --- Transformations ---
// Keeps the rows of the given classes and renames them 0, 1, … in the order given.
Dataset select_classes(const Dataset& data, const std::vector<std::int64_t>& classes);
// Keeps round(fraction * count) of a class's rows, at least 1, chosen by a keyed permutation.
Dataset thin_class(const Dataset& data, std::int64_t class_number, double fraction,
                   std::uint64_t seed);
// A key for each row: its class, or the value of a column (a feature's name, or `target`'s). Throws
// ConfigError for a column that there is not, with the nearest as a hint.
std::vector<std::uint64_t> keys_of(const Dataset& data, const std::string& column,
                                   const std::string& target);
// Rows chosen for the test set by a keyed permutation: test = round(fraction * rows), at least 1
// row on either side.
TrainTest split_dataset(const Dataset& data, double test_fraction, std::uint64_t seed);
// Mean and standard deviation of every feature over all rows (deviation 1 where it is 0),
// accumulated in double.
std::pair<std::vector<float>, std::vector<float>> feature_statistics(const Dataset& data);

}  // namespace lockstep
