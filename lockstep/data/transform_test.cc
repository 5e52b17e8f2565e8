#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/data/dataset.h"

namespace lockstep {
namespace {

// Row i holds i and 2 i, and its class is i % 3.
Dataset numbered(std::uint64_t rows) {
  Dataset data;
  data.source = "numbered";
  data.sample_shape = {2};
  data.rows = rows;
  data.class_count = 3;
  for (std::uint64_t i = 0; i < rows; ++i) {
    data.values.insert(data.values.end(), {static_cast<float>(i), static_cast<float>(2 * i)});
    data.classes.push_back(static_cast<std::int64_t>(i % 3));
  }
  return data;
}

TEST(SelectClasses, KeepsAndRenamesInTheOrderGiven) {
  const Dataset data = select_classes(numbered(6), {2, 0});
  EXPECT_EQ(data.rows, 4u);
  EXPECT_EQ(data.classes, (std::vector<std::int64_t>{1, 0, 1, 0}));
  EXPECT_EQ(data.values, (std::vector<float>{0, 0, 2, 4, 3, 6, 5, 10}));
  EXPECT_EQ(data.class_count, 2);
  EXPECT_THROW(select_classes(numbered(6), {0, 3}), ConfigError);
  EXPECT_THROW(select_classes(numbered(6), {-1, 0}), ConfigError);
  EXPECT_THROW(select_classes(numbered(1), {1, 2}), ConfigError);
}

TEST(ThinClass, KeepsAPartOfOneClassAndAllOfTheOthers) {
  const Dataset data = thin_class(numbered(300), 1, 0.05, 7);
  EXPECT_EQ(data.rows, 205u);
  EXPECT_EQ(std::count(data.classes.begin(), data.classes.end(), 1), 5);
  for (std::size_t row = 0; row < data.rows; ++row)
    EXPECT_EQ(static_cast<std::int64_t>(data.values[2 * row]) % 3, data.classes[row]);
  EXPECT_EQ(thin_class(numbered(300), 1, 0.05, 7).values, data.values);
  EXPECT_NE(thin_class(numbered(300), 1, 0.05, 8).values, data.values);
  EXPECT_EQ(thin_class(numbered(6), 2, 1e-9, 7).rows, 5u);
  EXPECT_THROW(thin_class(numbered(6), 3, 0.5, 7), ConfigError);
}

TEST(KeysOf, ClassesColumnsAndTargets) {
  Dataset data = numbered(5);
  data.feature_names = {"a", "b"};
  EXPECT_EQ(keys_of(data, "", "y"), (std::vector<std::uint64_t>{0, 1, 2, 0, 1}));
  EXPECT_EQ(keys_of(data, "y", "y"), keys_of(data, "", "y"));
  data.values[3] = data.values[9] = 0.5f;
  data.values[1] = -0.0f, data.values[5] = 0.0f;
  const auto keys = keys_of(data, "b", "y");
  EXPECT_EQ(keys[1], keys[4]);
  EXPECT_EQ(keys[0], keys[2]);
  EXPECT_NE(keys[0], keys[3]);
  try {
    keys_of(data, "B", "y");
    ADD_FAILURE() << "accepted";
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("did you mean b?"), std::string::npos);
  }
}

class LoadText : public testing::Test {
 protected:
  LoadText() { std::filesystem::create_directories(folder_ / "b"); }
  ~LoadText() override { std::filesystem::remove_all(folder_); }
  const std::filesystem::path folder_ = std::filesystem::path(testing::TempDir()) /
                                        ("lockstep_text_test_" + std::to_string(::getpid()));
};

TEST_F(LoadText, BlocksOfAllFilesInTheOrderOfTheirPaths) {
  write_file_atomically(folder_ / "c", std::string_view("ghij"));
  write_file_atomically(folder_ / "b" / "z", std::string_view("ef"));
  write_file_atomically(folder_ / "a", std::string_view("abcd"));
  const Dataset data = load_text({folder_}, 4);
  EXPECT_EQ(data.sample_shape, (std::vector<std::int64_t>{4}));
  EXPECT_EQ(std::string(data.bytes.begin(), data.bytes.end()), "abcddefgghij");
  EXPECT_EQ(data.rows, 3u);
  EXPECT_EQ(load_text({folder_ / "a", folder_ / "c"}, 8).rows, 1u);
  EXPECT_THROW(load_text({folder_}, 11), ConfigError);
  EXPECT_THROW(load_text({folder_ / "none"}, 4), ConfigError);
}

TEST(SplitDataset, EveryRowOnOneSide) {
  for (const std::uint64_t rows : {2u, 3u, 10u, 1000u}) {
    for (const double fraction : {0.001, 0.2, 0.5, 0.999}) {
      const TrainTest parts = split_dataset(numbered(rows), fraction, 42);
      const double wanted = std::round(fraction * static_cast<double>(rows));
      EXPECT_EQ(static_cast<double>(parts.test.rows),
                std::clamp(wanted, 1.0, static_cast<double>(rows - 1)));
      std::multiset<float> seen;
      for (const Dataset* part : {&parts.train, &parts.test}) {
        ASSERT_EQ(part->values.size(), 2 * part->rows);
        ASSERT_EQ(part->classes.size(), part->rows);
        for (std::uint64_t i = 0; i < part->rows; ++i) {
          seen.insert(part->values[2 * i]);
          EXPECT_EQ(part->values[2 * i + 1], 2 * part->values[2 * i]);
          EXPECT_EQ(part->classes[i], static_cast<std::int64_t>(part->values[2 * i]) % 3);
        }
      }
      EXPECT_EQ(seen.size(), rows);
      EXPECT_EQ(std::set<float>(seen.begin(), seen.end()).size(), rows);
    }
  }
}

TEST(SplitDataset, FollowsFromTheSeed) {
  const Dataset data = numbered(1000);
  EXPECT_EQ(split_dataset(data, 0.2, 42).test.values, split_dataset(data, 0.2, 42).test.values);
  EXPECT_NE(split_dataset(data, 0.2, 42).test.values, split_dataset(data, 0.2, 43).test.values);
  EXPECT_EQ(split_dataset(data, 0, 42).test.rows, 0u);
  EXPECT_EQ(split_dataset(data, 0, 42).train.rows, 1000u);
  EXPECT_THROW(split_dataset(numbered(1), 0.2, 42), ConfigError);
}

TEST(FeatureStatistics, OfValuesAndBytes) {
  Dataset data;
  data.sample_shape = {3};
  data.rows = 4;
  data.values = {1, 5, -1, 2, 5, 1, 3, 5, -1, 4, 5, 1};
  const std::pair<std::vector<float>, std::vector<float>> expected = {
      {2.5f, 5, 0}, {std::sqrt(1.25f), 1, 1}};  // no deviation counts as 1
  EXPECT_EQ(feature_statistics(data), expected);
  data.values.clear();
  data.bytes = {1, 5, 0, 2, 5, 2, 3, 5, 0, 4, 5, 2};
  EXPECT_EQ(feature_statistics(data).first, (std::vector<float>{2.5f, 5, 1}));
  EXPECT_EQ(feature_statistics(data).second, expected.second);
}

TEST(FeatureStatistics, BytesDoNotOverflow) {
  Dataset data;
  data.sample_shape = {1};
  data.rows = 150000;
  data.bytes.assign(data.rows, 255);
  for (std::uint64_t i = 0; i < data.rows; i += 2) data.bytes[i] = 253;
  EXPECT_EQ(feature_statistics(data).first, std::vector<float>{254});
  EXPECT_EQ(feature_statistics(data).second, std::vector<float>{1});
}

TEST(LinearRegression, IsTheSameForEver) {
  const LinearRegressionData made = make_linear_regression(1000, 10, 0.1, 42);
  EXPECT_EQ(made.weights[0], -0.756873548f);
  EXPECT_EQ(made.bias, -0.330091596f);
  EXPECT_EQ(made.data.values[0], -0.0448040813f);
  EXPECT_EQ(made.data.values[9999], 1.07321036f);
  EXPECT_EQ(made.data.targets[999], 5.96280527f);
  EXPECT_NE(make_linear_regression(1000, 10, 0.1, 43).weights, made.weights);
  // The first rows do not depend on how many there are.
  EXPECT_EQ(make_linear_regression(3, 10, 0.1, 42).data.targets[2], made.data.targets[2]);
}

TEST(LinearRegression, IsNormalAndFollowsItsWeights) {
  const LinearRegressionData made = make_linear_regression(20000, 3, 0.5, 7);
  const auto [mean, deviation] = feature_statistics(made.data);
  double fourth = 0;
  for (const float x : made.data.values) fourth += std::pow(x, 4) / 60000.0;
  for (int j = 0; j < 3; ++j) {
    EXPECT_NEAR(mean[j], 0, 0.03);
    EXPECT_NEAR(deviation[j], 1, 0.03);
  }
  EXPECT_NEAR(fourth, 3, 0.15);
  double square = 0;
  for (std::size_t i = 0; i < made.data.rows; ++i) {
    double residual = made.data.targets[i] - made.bias;
    for (std::size_t j = 0; j < 3; ++j) residual -= made.data.values[3 * i + j] * made.weights[j];
    square += residual * residual / 20000;
  }
  EXPECT_NEAR(std::sqrt(square), 0.5, 0.02);
  EXPECT_EQ(made.data.class_count, 0);
}

}  // namespace
}  // namespace lockstep
