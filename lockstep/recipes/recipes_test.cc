// Models, losses, the closed form and saved models, each against a value computed another way.
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "lockstep/base/error.h"
#include "lockstep/bridge/dtypes.h"
#include "lockstep/recipes/linear_regression.h"
#include "lockstep/recipes/loss.h"
#include "lockstep/recipes/model.h"
#include "lockstep/recipes/recipe.h"
#include "lockstep/recipes/saved_model.h"
#include "lockstep/recipes/text.h"
#include "lockstep/recipes/works.h"

namespace lockstep {
namespace {

std::int64_t parameter_count(const Model& model) {
  std::int64_t count = 0;
  for (const auto& parameter : model.module->parameters()) count += parameter.numel();
  return count;
}

TEST(Model, MlpOfAnyWidths) {
  const Model classic = make_model({.name = "mlp", .widths = {128, 64}}, {28, 28}, 10, 1);
  EXPECT_EQ(parameter_count(classic), 784 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10);
  EXPECT_EQ(classic.forward(at::zeros({3, 1, 28, 28})).sizes().vec(),
            (std::vector<std::int64_t>{3, 10}));
  const Model linear = make_model({.name = "mlp", .widths = {}, .bias = false}, {7}, 1, 1);
  EXPECT_EQ(parameter_count(linear), 7);
}

TEST(Model, CnnWithAndWithoutBatchNorm) {
  const std::int64_t plain = 32 * 9 + 32 + 64 * 32 * 9 + 64 + 64 * 49 * 128 + 128 + 128 * 10 + 10;
  EXPECT_EQ(parameter_count(make_model({.name = "cnn"}, {28, 28}, 10, 1)), plain);
  const Model norm =
      make_model({.name = "cnn", .batch_norm = true, .dropout = 0.5}, {28, 28}, 10, 1);
  EXPECT_EQ(parameter_count(norm), plain + 2 * (32 + 64));
  EXPECT_EQ(norm.forward(at::zeros({2, 1, 28, 28})).sizes().vec(),
            (std::vector<std::int64_t>{2, 10}));
  EXPECT_THROW(make_model({.name = "cnn"}, {784}, 10, 1), ConfigError);
}

TEST(Model, SameSeedSameWeights) {
  const auto first = make_model({}, {5}, 2, 7).module->parameters();
  const auto same = make_model({}, {5}, 2, 7).module->parameters();
  const auto other = make_model({}, {5}, 2, 8).module->parameters();
  for (std::size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(first[i].equal(same[i]));
  EXPECT_FALSE(first[0].equal(other[0]));
}

TEST(Model, ResNet18PadsSmallImages) {
  const Model model = make_model({.name = "resnet18"}, {28, 28}, 10, 1);
  // torchvision's resnet18 has 11,689,512 with a 7×7 stem of 3 channels and 1,000 outputs.
  EXPECT_EQ(parameter_count(model),
            11'689'512 - 64 * 3 * 49 + 64 * 9 - 512 * 1000 - 1000 + 512 * 10 + 10);
  model.module->eval();
  const at::Tensor images = at::randn({2, 1, 28, 28});
  at::Tensor padded = at::zeros({2, 1, 32, 32});
  padded.slice(2, 2, 30).slice(3, 2, 30).copy_(images);
  const at::Tensor output = model.forward(images);
  EXPECT_EQ(output.sizes().vec(), (std::vector<std::int64_t>{2, 10}));
  EXPECT_TRUE(output.equal(model.forward(padded)));
}

TEST(Model, GptSeesNothingAhead) {
  const ModelSettings settings{.name = "gpt", .layers = 2, .heads = 2, .width = 16, .context = 8};
  const Model model = make_model(settings, {}, 32, 1);
  const std::int64_t block = 12 * 16 * 16 + 13 * 16;  // weights, biases and norms
  EXPECT_EQ(parameter_count(model), 2 * block + 32 * 16 + 8 * 16 + 2 * 16);
  ModelSettings untied = settings;
  untied.tied = false;
  EXPECT_EQ(parameter_count(make_model(untied, {}, 32, 1)), parameter_count(model) + 32 * 16);

  at::Tensor tokens = at::tensor({1L, 2L, 3L, 4L, 5L, 6L}).reshape({1, 6});
  const at::Tensor before = model.forward(tokens);
  EXPECT_EQ(before.sizes().vec(), (std::vector<std::int64_t>{1, 6, 32}));
  tokens[0][4] = 31;
  const at::Tensor after = model.forward(tokens);
  EXPECT_TRUE(after.slice(1, 0, 4).allclose(before.slice(1, 0, 4)));
  EXPECT_FALSE(after.slice(1, 4, 5).allclose(before.slice(1, 4, 5)));
  const Model bytes = make_model(settings, {}, kByteValues, 1);
  EXPECT_EQ(generate(bytes, 8, "abc", 20, 1).size(), 23u);
  EXPECT_EQ(generate(bytes, 8, "", 5, 1), generate(bytes, 8, "\n", 5, 1));
}

TEST(Text, BatchesAreBlocksAndTheSameOneByteOn) {
  Dataset data;
  data.sample_shape = {4};
  data.bytes = {1, 2, 3, 250, 250, 6, 7, 8};
  data.rows = 2;
  const TextBatches batches(data);
  const Batch batch = batches.batch(std::vector<std::uint64_t>{1, 0});
  EXPECT_TRUE(batch.input.equal(at::tensor({250L, 6L, 7L, 1L, 2L, 3L}).reshape({2, 3})));
  EXPECT_TRUE(batch.target.equal(at::tensor({6L, 7L, 8L, 2L, 3L, 250L}).reshape({2, 3})));
  const LossValue loss = text_loss(at::zeros({2, 3, 256}), batch.target);
  EXPECT_EQ(loss.weight, 6);
  EXPECT_NEAR(loss.sum.item<double>(), 6 * std::log(256.0), 1e-4);
}

TEST(Works, EachTakesItsBatches) {
  for (const Work& work : works()) {
    if (work.name == "W3" || work.name == "W5") continue;  // seconds
    const Model model = make_model(work, 1);
    const std::vector<Batch> batches = make_batches(work, 1);
    EXPECT_EQ(batches[0].input.size(0), work.batch_size);
    const double loss =
        mean_loss(model.forward(batches[0].input), batches[0].target).item<double>();
    EXPECT_NEAR(loss, std::log(static_cast<double>(work.outputs)), 0.3) << work.name;
  }
  EXPECT_EQ(parameter_count(make_model(work_named("W4"), 1)), 10'721'664);
  EXPECT_THROW(work_named("W6"), ConfigError);
}

TEST(Loss, CrossEntropyOfClassesAndOneHotAgree) {
  const at::Tensor output = at::tensor({1.0f, 2.0f, 0.5f, 0.0f, 0.0f, 3.0f}).reshape({2, 3});
  const at::Tensor classes = at::tensor({1L, 0L});
  const at::Tensor one_hot = at::tensor({0.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f}).reshape({2, 3});
  double expected = std::log(std::exp(1.0) + std::exp(2.0) + std::exp(0.5)) - 2.0;
  expected += std::log(2 + std::exp(3.0));
  const Objective by_class = make_objective({}, 3);
  const Objective by_one_hot = make_objective({.one_hot = true}, 3);
  EXPECT_NEAR(by_class.loss(output, classes).sum.item<double>(), expected, 1e-5);
  EXPECT_NEAR(by_one_hot.loss(output, one_hot).sum.item<double>(), expected, 1e-5);
  EXPECT_EQ(by_class.loss(output, classes).weight, 2.0);
  EXPECT_EQ(by_class.correct(output, classes), 1);
  EXPECT_EQ(by_one_hot.correct(output, one_hot), 1);
  EXPECT_EQ(by_class.outputs, 3);
}

TEST(Loss, HingeHuberAndSquares) {
  const at::Tensor output = at::tensor({0.5f, -2.0f, 3.0f}).reshape({3, 1});
  const at::Tensor signs = at::tensor({1.0f, 1.0f, 1.0f}).reshape({3, 1});
  const Objective hinge = make_objective({.name = "hinge"}, 2);
  EXPECT_NEAR(hinge.loss(output, signs).sum.item<double>(), 0.5 + 3.0, 1e-6);
  EXPECT_EQ(hinge.correct(output, signs), 2);
  EXPECT_EQ(hinge.outputs, 1);
  const Objective squares = make_objective({.name = "mean_squared_error"}, 0);
  EXPECT_NEAR(squares.loss(output, signs).sum.item<double>(), 0.25 + 9 + 4, 1e-5);
  const Objective huber = make_objective({.name = "huber", .delta = 2.0}, 0);
  EXPECT_NEAR(huber.loss(output, signs).sum.item<double>(), 0.125 + 2 * (3 - 1.0) + 2.0, 1e-5);
}

TEST(Loss, RefusesWhatDoesNotFit) {
  EXPECT_THROW(make_objective({.name = "hinge"}, 3), ConfigError);
  EXPECT_THROW(make_objective({.name = "huber"}, 3), ConfigError);
  EXPECT_THROW(make_objective({.name = "cross_entropy"}, 0), ConfigError);
}

TEST(NormalEquations, FindTheWeightsOfNoiselessData) {
  const LinearRegressionData made = make_linear_regression(200, 6, 0.0, 3);
  const World world = init_from(Place{}, {});
  for (int virtual_ranks : {1, 3, 10}) {
    const LinearSolution found = solve_normal_equations(world, made.data, virtual_ranks);
    for (std::size_t i = 0; i < 6; ++i) EXPECT_NEAR(found.weights[i], made.weights[i], 1e-5);
    EXPECT_NEAR(found.bias, made.bias, 1e-5);
  }
}

TEST(NormalEquations, RefuseDependentFeatures) {
  LinearRegressionData made = make_linear_regression(50, 2, 0.0, 3);
  for (std::size_t row = 0; row < 50; ++row)
    made.data.values[2 * row + 1] = made.data.values[2 * row];
  EXPECT_THROW(solve_normal_equations(init_from(Place{}, {}), made.data, 2), ConfigError);
}

class SavedModel : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::temp_directory_path() /
            ("lockstep_recipes_test_" + std::to_string(getpid()));
  }
  void TearDown() override { std::filesystem::remove(path_); }
  void save(const std::vector<NamedTensor>& tensors) {
    std::vector<TensorView> views;
    for (const NamedTensor& named : tensors)
      views.push_back({named.name, dtype_from(named.tensor.scalar_type()).value(),
                       named.tensor.sizes().vec(), bytes_of(named.tensor)});
    write_safetensors(path_, views);
  }
  std::filesystem::path path_;
};

TEST_F(SavedModel, RoundTrip) {
  const Model saved = make_model({.name = "cnn", .batch_norm = true}, {8, 8}, 3, 1);
  std::vector<NamedTensor> tensors = named_parameters(*saved.module);
  for (const NamedTensor& buffer : named_buffers(*saved.module)) tensors.push_back(buffer);
  for (const NamedTensor& input : input_tensors({{1.5f}, {2.5f}}, {"a", "b c"}))
    tensors.push_back(input);
  save(tensors);

  const SafetensorsFile file = SafetensorsFile::read(path_);
  const Model loaded = make_model({.name = "cnn", .batch_norm = true}, {8, 8}, 3, 2);
  load_module(*loaded.module, file, "model");
  const at::Tensor x = at::randn({2, 1, 8, 8});
  saved.module->eval();
  loaded.module->eval();
  EXPECT_TRUE(saved.forward(x).equal(loaded.forward(x)));
  const SavedInput input = read_input_tensors(file, "model");
  EXPECT_EQ(input.normalization.mean, std::vector<float>{1.5f});
  EXPECT_EQ(input.normalization.deviation, std::vector<float>{2.5f});
  EXPECT_EQ(input.columns, (std::vector<std::string>{"a", "b c"}));
}

TEST_F(SavedModel, AnotherModelIsRefusedByTensorName) {
  save(named_parameters(*make_model({.widths = {4}}, {3}, 2, 1).module));
  const SafetensorsFile file = SafetensorsFile::read(path_);
  const auto message = [&](const ModelSettings& settings) -> std::string {
    try {
      load_module(*make_model(settings, {3}, 2, 1).module, file, "model.safetensors");
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_NE(message({.widths = {5}})
                .find("layer1.weight is float32 [4, 3], the model takes float32 [5, 3]"),
            std::string::npos)
      << message({.widths = {5}});
  EXPECT_NE(message({.widths = {4, 2}}).find("layer3.weight is missing"), std::string::npos)
      << message({.widths = {4, 2}});
  EXPECT_THROW(read_input_tensors(file, "model.safetensors"), ConfigError);
}

TEST(RecipeData, LinearRegressionIsSplitAndKnown) {
  Job job;
  job.recipe = "linear-regression";
  job.dataset.rows = 100;
  job.dataset.features = 4;
  job.dataset.normalize = "none";
  job.split = {0.2, 42};
  const RecipeData data = load_recipe_data(job);
  EXPECT_EQ(data.sets.train.rows, 80u);
  EXPECT_EQ(data.sets.test.rows, 20u);
  EXPECT_EQ(data.known_weights.size(), 4u);
  EXPECT_EQ(data.normalization.mean, std::vector<float>{0.0f});
}

}  // namespace
}  // namespace lockstep
