#include "lockstep/job/job.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <random>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"

namespace lockstep {
namespace {

using testing::EndsWith;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

const std::filesystem::path kSource = std::filesystem::path(__FILE__).parent_path() / "../..";

std::string error_of(const std::string& toml, const std::vector<Override>& overrides = {}) {
  try {
    parse_job(toml, "job.toml", overrides);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}
std::string error_of_mnist(const std::string& toml) {
  return error_of("recipe = 'mnist'\ndata = '/d'\n" + toml);
}
Job resolve(const std::string& name, std::vector<Override> overrides = {}) {
  return resolve_job(name, overrides);
}

void expect_round_trip(const Job& job) {
  const std::string text = to_toml(job);
  EXPECT_EQ(to_toml(parse_job(text, "j")), text);
}

TEST(Nearest, FindsTyposAndNothingFarAway) {
  const std::vector<std::string> words = {"adam", "adamw", "sgd", "momentum"};
  EXPECT_EQ(nearest("admaw", words), "adamw");
  EXPECT_EQ(nearest("adm", words), "adam");
  EXPECT_EQ(nearest("momentun", words), "momentum");
  EXPECT_EQ(nearest("SGD", words), "sgd");
  EXPECT_EQ(nearest("y", {"x", "Y"}), "Y");
  EXPECT_EQ(nearest("rmsprop", words), "");
  EXPECT_EQ(nearest("", words), "");
  EXPECT_EQ(nearest("sgd", {}), "");
  EXPECT_EQ(nearest(std::string(1 << 20, 'a'), words), "");
}

TEST(Job, RecipesAreComplete) {
  const Job job = resolve("fashion-mnist");
  EXPECT_EQ(job.recipe, "fashion-mnist");
  EXPECT_EQ(job.data, "/usr/share/datasets/fashion-mnist");
  EXPECT_EQ(job.model.widths, (std::vector<std::int64_t>{128, 64}));
  EXPECT_EQ(job.optimizer.name, "adam");
  EXPECT_EQ(job.loss.name, "cross_entropy");
  EXPECT_EQ(job.dataset.normalize, "standard");
  EXPECT_EQ(job.train.global_batch_size, 64);
  EXPECT_EQ(job.train.virtual_ranks, 1);
  EXPECT_EQ(job.train.batch_size, 0);

  const Job linear = resolve("linear-regression", {{"workers.count", "10", "--workers"}});
  EXPECT_TRUE(linear.model.widths.empty());
  EXPECT_EQ(linear.optimizer.name, "sgd");
  EXPECT_EQ(linear.loss.name, "mean_squared_error");
  EXPECT_EQ(linear.split.test, 0.2);
  EXPECT_EQ(linear.split.seed, 42u);
  EXPECT_EQ(linear.data, "");
  EXPECT_EQ(linear.train.virtual_ranks, 10);
  EXPECT_EQ(linear.train.global_batch_size, 160);

  const std::vector<Override> csv = {{"data", "table.csv", "--data"},
                                     {"dataset.target", "price", "--set"}};
  EXPECT_EQ(resolve("csv", csv).loss.name, "mean_squared_error");
  EXPECT_EQ(resolve("csv", csv).split.test, 0.2);
  EXPECT_EQ(resolve("csv", csv).data, (std::filesystem::current_path() / "table.csv").string());
  auto classes = csv;
  classes.push_back({"dataset.task", "classification", "--set"});
  EXPECT_EQ(resolve("csv", classes).loss.name, "cross_entropy");
}

TEST(Job, TheFileOfTheContract) {
  const Job job = parse_job(R"(
recipe = "mnist"
data = "/path/to/folder"
output = "runs/first"
[model]
name = "mlp"
widths = [128, 64]
[optimizer]
name = "adam"
lr = 1e-3
[train]
epochs = 10
batch_size = 64
virtual_ranks = 2
seed = 1
[workers]
count = 2
threads = 1
)",
                            "job.toml");
  EXPECT_EQ(job.output, "runs/first");
  EXPECT_EQ(job.train.global_batch_size, 128);
  EXPECT_EQ(job.optimizer.lr, 1e-3);
  EXPECT_EQ(job.workers.count, 2);
}

TEST(Job, SplitAsInlineTableSectionOrDottedKey) {
  const std::string head = "recipe = 'linear-regression'\n";
  for (const char* split : {"split = { test = 0.25, seed = 7 }", "[split]\ntest = 0.25\nseed = 7",
                            "split.test = 0.25\nsplit.seed = 7"}) {
    const Job job = parse_job(head + split, "job.toml");
    EXPECT_EQ(job.split.test, 0.25) << split;
    EXPECT_EQ(job.split.seed, 7u) << split;
  }
}

TEST(Job, UnknownKeysNameThePlaceAndTheNearestKey) {
  EXPECT_EQ(error_of_mnist("[train]\nbatchsize = 3"),
            "job.toml:4: train.batchsize: unknown key; hint: did you mean train.batch_size?");
  EXPECT_EQ(error_of_mnist("[train]\nlr = 3"),
            "job.toml:4: train.lr: unknown key; hint: did you mean optimizer.lr?");
  EXPECT_EQ(error_of("recipe = 'fashion-mnist'", {{"train.lr", "3", "--set"}}),
            "--set: train.lr: unknown key; hint: did you mean optimizer.lr?");
  EXPECT_EQ(error_of_mnist("[modle]\nwidths = []"),
            "job.toml:3: modle: unknown key; hint: did you mean [model]?");
  EXPECT_EQ(error_of_mnist("batchsize = 3"),
            "job.toml:3: batchsize: unknown key; hint: did you mean train.batch_size?");
  EXPECT_EQ(error_of_mnist("zzzzzz = 3"),
            "job.toml:3: zzzzzz: unknown key; hint: docs/job-file.md lists every key");
  EXPECT_THAT(error_of_mnist("\"a\\nb\" = 3"), StartsWith("job.toml:3: a\\u000Ab: unknown key"));
  EXPECT_THAT(error_of_mnist("train = 3"), HasSubstr("job.toml:3: train: must be a table, not 3"));
  EXPECT_THAT(error_of_mnist("[train.epochs]\nx = 1"),
              HasSubstr("train.epochs: must be an integer, not a table"));
  EXPECT_THAT(error_of_mnist("[data]\nx = 1"), StartsWith("job.toml:3: "));  // TOML: defined twice
}

TEST(Job, WrongTypes) {
  EXPECT_EQ(error_of_mnist("train.epochs = 1.5"),
            "job.toml:3: train.epochs: must be an integer, not 1.5; hint: for example train.epochs "
            "= 10");
  EXPECT_THAT(error_of_mnist("train.epochs = 'ten'"), HasSubstr("must be an integer, not \"ten\""));
  EXPECT_THAT(error_of_mnist("optimizer.lr = true"), HasSubstr("must be a number, not true"));
  EXPECT_THAT(error_of_mnist("train.shuffle = 1"), HasSubstr("must be true or false, not 1"));
  EXPECT_THAT(error_of_mnist("model.widths = 3"), HasSubstr("must be a list of integers, not 3"));
  EXPECT_THAT(error_of_mnist("model.widths = [1, 2.5]"), HasSubstr("list of integers, not 2.5"));
  EXPECT_THAT(error_of_mnist("output = 2020-01-01"), HasSubstr("must be text, not a date"));
  EXPECT_THAT(error_of_mnist("output = \"a\\u0000b\""), HasSubstr("NUL"));
  EXPECT_EQ(parse_job("recipe = 'fashion-mnist'\noptimizer.lr = 1", "j").optimizer.lr, 1.0);
}

TEST(Job, OutOfRange) {
  EXPECT_EQ(error_of_mnist("train.epochs = 0"),
            "job.toml:3: train.epochs: 0 is out of range; hint: allowed: >= 1 and <= 1000000");
  EXPECT_THAT(error_of_mnist("optimizer.lr = 0"), EndsWith("allowed: >= 1e-30 and <= 1e+30"));
  EXPECT_THAT(error_of_mnist("model.dropout = 1.0"), EndsWith("hint: allowed: >= 0 and < 1"));
  EXPECT_THAT(error_of_mnist("optimizer.lr = nan"), HasSubstr("nan is not a finite number"));
  EXPECT_THAT(error_of_mnist("optimizer.lr = inf"), HasSubstr("inf is not a finite number"));
  EXPECT_THAT(error_of_mnist("train.seed = -1"), HasSubstr("-1 is out of range"));
  EXPECT_THAT(error_of_mnist("model.widths = [3, 0]"), HasSubstr("model.widths: 0 is out of"));
  EXPECT_EQ(parse_job("recipe='fashion-mnist'\ntrain.seed = 9223372036854775807", "j").train.seed,
            9223372036854775807u);
}

// What becomes fp32 stays finite there, stays above 0 and stays below 1.
TEST(Job, NumbersFitFloats) {
  for (const char* key : {"optimizer.lr", "optimizer.eps", "loss.delta"}) {
    for (const char* value : {"1e31", "1e300", "1e-31", "5e-324", "0", "-1"})
      EXPECT_THAT(error_of_mnist(fmt::format("{} = {}", key, value)),
                  EndsWith("is out of range; hint: allowed: >= 1e-30 and <= 1e+30"))
          << key << value;
  }
  for (const char* key : {"schedule.min_lr", "train.clip_grad_norm", "dataset.noise"})
    EXPECT_THAT(error_of_mnist(fmt::format("{} = 1e39", key)),
                EndsWith("allowed: >= 0 and <= 1e+30"));
  for (const char* key : {"optimizer.momentum", "optimizer.beta1", "optimizer.beta2"})
    EXPECT_THAT(error_of_mnist(fmt::format("{} = 0.99999999", key)),
                EndsWith("allowed: >= 0 and <= 0.9999999"));
  EXPECT_LT(static_cast<float>(0.9999999), 1.0f);
  EXPECT_THAT(error_of_mnist("optimizer.weight_decay = 1e7"),
              EndsWith("allowed: >= 0 and <= 1000000"));
  EXPECT_THAT(error_of_mnist("schedule.gamma = 1.5"), EndsWith("allowed: > 0 and <= 1"));
}

TEST(Job, UnknownWords) {
  EXPECT_EQ(error_of_mnist("model.name = 'mpl'"),
            "job.toml:3: model.name: unknown model \"mpl\"; hint: did you mean \"mlp\"? (one of "
            "mlp, cnn, resnet18, gpt)");
  EXPECT_THAT(error_of("recipe = 'mnits'"), HasSubstr("did you mean \"mnist\"?"));
  EXPECT_THAT(error_of_mnist("dataset.normalize = 'unti'"),
              HasSubstr("unknown normalize \"unti\"; hint: did you mean \"unit\"?"));
  EXPECT_THAT(error_of_mnist("optimizer.name = 'rmsprop'"),
              EndsWith("hint: one of sgd, momentum, nesterov, adam, adamw, closed_form"));
  EXPECT_THAT(error_of("data = '/d'"), HasSubstr("job.toml: recipe: is missing; hint: one of"));
  EXPECT_THAT(error_of(""), HasSubstr("recipe: is missing"));
}

TEST(Job, SyntaxErrorsNameTheLine) {
  EXPECT_THAT(error_of("recipe = 'mnist'\nepochs = = 3"), StartsWith("job.toml:2: "));
  EXPECT_THAT(error_of("recipe = 'mnist'\nrecipe = 'csv'"), StartsWith("job.toml:2: "));
  for (const char* text : {"x = \"\n\"", "[", "\xff\xfe", "a = 1\n\n[[b]]\n]", "a = '\x01'"}) {
    const std::string error = error_of(text);
    EXPECT_THAT(error, StartsWith("job.toml:"));
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  }
}

TEST(Job, OverridesWinAndTakeBareWords) {
  const std::string file = "recipe = 'fashion-mnist'\ntrain.epochs = 3\ndata = '/d'";
  const Job job = parse_job(file, "job.toml",
                            {{"train.epochs", "4", "--epochs"},
                             {"train.epochs", "5", "--set"},
                             {"model.widths", "[10, 20]", "--set"},
                             {"optimizer.name", "sgd", "--set"},
                             {"optimizer.lr", "1e-4", "--set"},
                             {"loss.name", "\"cross_entropy\"", "--set"},
                             {"data", "2020-01-01", "--data"},
                             {"output", "true", "--output"},
                             {"train.shuffle", "false", "--set"}});
  EXPECT_EQ(job.train.epochs, 5);
  EXPECT_EQ(job.model.widths, (std::vector<std::int64_t>{10, 20}));
  EXPECT_EQ(job.optimizer.name, "sgd");
  EXPECT_EQ(job.optimizer.lr, 1e-4);
  EXPECT_THAT(job.data, EndsWith("/2020-01-01"));
  EXPECT_EQ(job.output, "true");
  EXPECT_FALSE(job.train.shuffle);

  EXPECT_EQ(error_of(file, {{"train.epochs", "ten", "--epochs"}}),
            "--epochs: train.epochs: must be an integer, not \"ten\"; hint: for example "
            "train.epochs = 10");
  EXPECT_THAT(error_of(file, {{"train.epochs", "1\nrecipe = 'csv'", "--set"}}),
              HasSubstr("must be an integer, not \"1\\u000Arecipe = 'csv'\""));
  EXPECT_THAT(error_of(file, {{"train.epochs", "", "--set"}}), HasSubstr("must be an integer"));
  EXPECT_THAT(error_of(file, {{"data", "\xff", "--data"}}), HasSubstr("not UTF-8"));
  EXPECT_THAT(error_of(file, {{"train", "3", "--set"}}), HasSubstr("train: must be a table"));
}

TEST(Job, OverridesMayBeInlineTables) {
  const std::string file = "recipe = 'linear-regression'\nsplit.test = 0.1";
  const Job job = parse_job(file, "j", {{"split", "{test = 0.25, seed = 7}", "--set"}});
  EXPECT_EQ(job.split.test, 0.25);
  EXPECT_EQ(job.split.seed, 7u);
  EXPECT_EQ(error_of(file, {{"split", "{tets=0.2}", "--set"}}),
            "--set: split.tets: unknown key; hint: did you mean split.test?");
  EXPECT_EQ(error_of(file, {{"split", "{test=2}", "--set"}}),
            "--set: split.test: 2 is out of range; hint: allowed: >= 0 and < 1");
  EXPECT_THAT(error_of(file, {{"split", "{test=", "--set"}}),
              HasSubstr("split: must be a table, not \"{test=\""));
}

TEST(Job, WholeNumbersThatAreTooLarge) {
  const std::string file = "recipe = 'linear-regression'\n";
  EXPECT_EQ(error_of(file, {{"train.epochs", "99999999999999999999", "--set"}}),
            "--set: train.epochs: 99999999999999999999 is too large; hint: allowed: >= 1 and <= "
            "1000000");
  EXPECT_THAT(error_of(file, {{"train.seed", "18446744073709551615", "--set"}}),
              EndsWith("is too large; hint: allowed: >= 0 and <= 2^63 - 1"));
  EXPECT_THAT(error_of(file + "train.seed = 18446744073709551615"),
              EndsWith("hint: whole numbers are at most 2^63 - 1"));
  EXPECT_THAT(error_of(file + "train.epochs = 1e3"), HasSubstr("must be an integer, not 1000.0"));
}

TEST(Job, BatchSizeSetAtTheHigherLevelCounts) {
  const std::string head = "recipe = 'fashion-mnist'\nworkers.count = 2\n";
  EXPECT_EQ(parse_job(head, "j").train.global_batch_size, 128);
  EXPECT_EQ(parse_job(head + "train.batch_size = 10", "j").train.global_batch_size, 20);
  EXPECT_EQ(parse_job(head + "train.global_batch_size = 10", "j").train.global_batch_size, 10);
  EXPECT_EQ(
      parse_job(head + "train.global_batch_size = 10", "j", {{"train.batch_size", "32", "--set"}})
          .train.global_batch_size,
      64);
  EXPECT_EQ(
      parse_job(head + "train.batch_size = 10", "j", {{"train.global_batch_size", "32", "--set"}})
          .train.global_batch_size,
      32);
  EXPECT_EQ(error_of(head + "train.batch_size = 10\ntrain.global_batch_size = 10"),
            "job.toml:4: train.global_batch_size: train.batch_size is set as well; hint: give one "
            "of the two");
}

TEST(Job, WorkersVirtualRanksAndBatch) {
  const std::string head = "recipe = 'fashion-mnist'\n";
  EXPECT_EQ(parse_job(head + "workers.count = 3", "j").train.virtual_ranks, 3);
  EXPECT_EQ(parse_job(head + "train.virtual_ranks = 4", "j").train.virtual_ranks, 4);
  EXPECT_THAT(error_of(head + "train.virtual_ranks = 2", {{"workers.count", "4", "--workers"}}),
              StartsWith("--workers: workers.count: 4 workers are more than the job's 2 virtual "
                         "ranks; hint: at most 2 workers"));
  EXPECT_THAT(error_of(head + "train.virtual_ranks = 8\ntrain.global_batch_size = 4"),
              StartsWith("job.toml:2: train.virtual_ranks: 8 virtual ranks cannot share a batch"));
  EXPECT_THAT(error_of(head + "workers.count = 8\ntrain.global_batch_size = 4"),
              StartsWith("job.toml:2: workers.count: 8 virtual ranks cannot share"));
}

TEST(Job, KeysThatDoNotFitTogether) {
  const std::string csv = "recipe = 'csv'\ndata = 't.csv'\ndataset.target = 'y'\n";
  const std::string made = "recipe = 'linear-regression'\n";
  const std::pair<std::string, std::string> cases[] = {
      {"recipe = 'mnist'", "job.toml: data: recipe mnist needs a folder"},
      {"recipe = 'csv'", "job.toml: data: recipe csv needs a CSV file"},
      {"recipe = 'csv'\ndata = 't.csv'", "dataset.target: recipe csv needs"},
      {made + "data = 'x'", "job.toml:2: data: linear-regression makes its own data"},
      {made + "model.name = 'cnn'", "model.name: cnn is for images"},
      {csv + "model.name = 'cnn'", "model.name: cnn is for images"},
      {csv + "dataset.delimiter = ''", "dataset.delimiter"},
      {csv + "dataset.delimiter = '::'", "dataset.delimiter"},
      {csv + "dataset.delimiter = '.'", "dataset.delimiter"},
      {csv + "dataset.normalize = 'unit'", "is for images"},
      {csv + "dataset.classes = [1, 2]", "dataset.classes: is for images"},
      {csv + "loss.name = 'hinge'", "loss.name: hinge does not fit regression"},
      {csv + "loss.name = 'cross_entropy'", "does not fit regression"},
      {csv + "dataset.task = 'classification'\nloss.name = 'huber'", "huber does not fit classes"},
      {csv + "optimizer.name = 'closed_form'", "closed_form is for the recipe linear-regression"},
      {made + "optimizer.name = 'closed_form'\nmodel.widths = [3]", "solves a linear model"},
      {made + "optimizer.name = 'closed_form'\nloss.name = 'huber'", "solves a linear model"},
      {made + "dataset.rows = 100000000\ndataset.features = 1000", "rows × features"},
      {made + "loss.one_hot = true", "loss.one_hot: is for cross_entropy"},
      {"recipe = 'fashion-mnist'\nloss.name = 'mean_squared_error'", "does not fit classes"},
      {"recipe = 'fashion-mnist'\nloss.name = 'hinge'", "hinge needs exactly two classes"},
      {"recipe = 'fashion-mnist'\nschedule.warmup_steps = 3", "\"constant\" has no warm-up"},
      {made + "schedule = {name = 'step', warmup_steps = 3}", "\"step\" has no warm-up"},
      {made + "schedule = {name = 'linear', min_lr = 1}", "schedule.min_lr: schedule.name = "},
      {"recipe = 'fashion-mnist'\ndataset.target = 'y'", "dataset.target: is for csv"},
      {"recipe = 'fashion-mnist'\nmodel.batch_norm = true", "is for the cnn"},
      {"recipe = 'fashion-mnist'\ntrain.strategy = 'diloco'\ntrain.accumulate = 2",
       "train.accumulate: train.strategy = \"diloco\" cannot do it"},
      {"recipe = 'fashion-mnist'\ntrain.strategy = 'local_sgd'\nworkers.count = 3\n"
       "workers.min = 2",
       "workers.min: "},
      {"recipe = 'fashion-mnist'\ndataset.classes = [1]", "one class"},
      {"recipe = 'fashion-mnist'\ndataset.classes = [1, 1]", "twice"},
      {csv + "dataset.keep_fraction = 0.5", "dataset.keep_fraction: is for classes"},
      {csv + "dataset.partition = 'weighted'", "weighted needs a key"},
      {csv + "dataset.partition_key = 'a'", "\"none\" has no use for it"},
      {"recipe = 'fashion-mnist'\ndataset.partition = 'hash'\ndataset.partition_key = 'a'",
       "dataset.partition_key: is for csv"},
      {csv + "model.name = 'resnet18'", "model.name: resnet18 is for images"},
      {csv + "model.name = 'gpt'", "model.name: gpt is not for csv"},
      {"recipe = 'gpt'\nmodel.name = 'mlp'", "model.name: mlp is not for gpt"},
      {"recipe = 'gpt'\nmodel.width = 130", "model.width: 130 does not divide into 4 heads"},
      {"recipe = 'gpt'\nloss.name = 'hinge'", "gpt learns by cross_entropy"},
      {"recipe = 'gpt'\ndataset.normalize = 'standard'", "text is not normalised"},
      {"recipe = 'gpt'\ndataset.partition = 'stratified'", "stratified needs a key"},
  };
  for (const auto& [toml, expected] : cases) {
    const std::string error = error_of(toml);
    EXPECT_THAT(error, HasSubstr(expected)) << toml;
    EXPECT_THAT(error, HasSubstr("; hint: ")) << toml;
    EXPECT_THAT(error, StartsWith("job.toml:")) << toml;
  }
  EXPECT_EQ(
      parse_job("recipe = 'fashion-mnist'\nloss.name = 'hinge'\ndataset.classes = [0, 1]", "j")
          .loss.name,
      "hinge");
}

TEST(Job, WhatFitsTogether) {
  for (const char* name : {"linear", "cosine"})
    EXPECT_EQ(parse_job(fmt::format("recipe = 'fashion-mnist'\nschedule.name = '{}'\n"
                                    "schedule.warmup_steps = 3",
                                    name),
                        "j")
                  .schedule.warmup_steps,
              3);
  const Job held_out = parse_job("recipe = 'fashion-mnist'\nsplit.test = 0.1", "j");
  EXPECT_EQ(held_out.split.test, 0.1);
  expect_round_trip(held_out);
  const std::string csv = "recipe = 'csv'\ndata = 't.csv'\ndataset.target = 'y'\n";
  EXPECT_EQ(parse_job(csv, "j", {{"dataset.delimiter", "\\t", "--set"}}).dataset.delimiter, "\t");
}

TEST(Job, ResolvedJobRunsAgainAsItIs) {
  Job job = resolve("fashion-mnist", {{"workers.count", "4", "--workers"}});
  expect_round_trip(job);
  EXPECT_THAT(to_toml(job), Not(HasSubstr("\nbatch_size")));
  EXPECT_THAT(to_toml(job), Not(HasSubstr("output")));
  // On other numbers of workers the batch stays.
  EXPECT_EQ(
      parse_job(to_toml(job), "j", {{"workers.count", "2", "--workers"}}).train.global_batch_size,
      256);

  job = parse_job(
      "recipe = 'csv'\ndata = \"/a \\\"b\\\\ \\t é\"\ndataset.target = \"x\\ny\"\n"
      "dataset.delimiter = \"\\t\"\nmodel.widths = []",
      "j");
  expect_round_trip(job);
  expect_round_trip(resolve("linear-regression"));

  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-300, 300);
  for (int i = 0; i < 300; ++i) {
    job.train.tolerance = std::pow(10.0, exponent(random));
    job.dataset.noise = std::ldexp(static_cast<double>(random()), -70);
    expect_round_trip(job);
  }
  for (double value :
       {1e16, 5e-324, 1.7976931348623157e308, 0.1, 3.0, 1e22, 123456789012345678.0}) {
    job.train.tolerance = value;
    EXPECT_EQ(parse_job(to_toml(job), "j").train.tolerance, value);
  }
}

TEST(Job, FilesAndNames) {
  EXPECT_THROW(resolve("fashion-mnits"), ConfigError);
  const auto error = [](const std::string& name) -> std::string {
    try {
      resolve(name);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_THAT(error("fashion-mnits"), HasSubstr("unknown recipe \"fashion-mnits\"; hint: did you "
                                                "mean \"fashion-mnist\"?"));
  EXPECT_THAT(error("no/such/job.toml"), HasSubstr("no/such/job.toml: No such file"));
  EXPECT_THAT(error("/"), HasSubstr("is a folder"));

  const auto path = std::filesystem::path(testing::TempDir()) / "lockstep_job_test.toml";
  std::ofstream(path) << "recipe = 'fashion-mnist'\n\ntrain.epochs = 'x'\n";
  EXPECT_THAT(error(path.string()), StartsWith(path.string() + ":3: train.epochs: must be"));
  std::filesystem::remove(path);
}

TEST(Job, ExamplesResolve) {
  int jobs = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kSource / "examples/jobs")) {
    if (entry.path().extension() != ".toml") continue;
    ++jobs;
    const Job job = resolve(entry.path().string());
    SCOPED_TRACE(entry.path());
    expect_round_trip(job);
  }
  EXPECT_GE(jobs, 7);
}

}  // namespace
}  // namespace lockstep
