#include "lockstep/job/schema.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lockstep::job {
namespace {

// A key's name is the way to its value in a Job.
#define KEY(PATH) \
#PATH, +[](Job & job) -> auto& { return job.PATH; }

constexpr double kMost = std::numeric_limits<double>::max();
constexpr double kMostSeed = 9223372036854775807.0;  // TOML's integers are signed

Limits between(double low, double high) { return {.low = low, .high = high}; }
Limits at_least(double low) { return {.low = low, .high = kMost}; }
Limits above_0(double high) { return {.low = 0, .high = high, .low_excluded = true}; }
Limits fraction() { return {.low = 0, .high = 1, .high_excluded = true}; }
// Numbers that the optimizers take as fp32, where products of two of them must not overflow either
// and what is below 1 or above 0 has to stay so.
Limits positive_float() { return between(1e-30, 1e30); }
Limits float_from_0() { return between(0, 1e30); }
Limits float_fraction() { return between(0, 0.9999999); }
Limits one_of(std::vector<std::string> words) { return {.words = std::move(words)}; }
Limits any() { return {}; }

std::string number(double value) {
  constexpr double kWritten = 1e15;  // in digits
  if (value == kMostSeed) return "2^63 - 1";
  const bool whole = std::abs(value) < kWritten && value == std::floor(value);
  return whole ? fmt::format("{}", static_cast<std::int64_t>(value)) : fmt::format("{}", value);
}

template <typename T>
std::string as_toml(const T& value) {
  return fmt::format("{}", value);
}
std::string as_toml(double value) {
  std::string text = fmt::format("{}", value);
  return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}
std::string as_toml(const std::string& value) { return toml_string(value); }

std::string escaped(std::string_view text, std::string_view also) {
  std::string result;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      result += fmt::format("\\u{:04X}", byte);
    } else {
      if (also.find(c) != std::string_view::npos) result += '\\';
      result += c;
    }
  }
  return result;
}

}  // namespace

bool Limits::contain(double value) const {
  return (low_excluded ? value > low : value >= low) &&
         (high_excluded ? value < high : value <= high);
}

std::string Limits::text() const {
  std::string result = fmt::format("{} {}", low_excluded ? ">" : ">=", number(low));
  if (high < kMost) result += fmt::format(" and {} {}", high_excluded ? "<" : "<=", number(high));
  return result;
}

const std::vector<Key>& schema() {
  const Limits seed = between(0, kMostSeed);
  static const std::vector<Key> keys = {
      {KEY(recipe), one_of(recipe_names()), "what to train on"},
      {KEY(data), any(),
       "folder (images), file (csv), or either (gpt; empty: libtorch's headers); relative to the "
       "current folder"},
      {KEY(output), any(), "folder to write to; empty: runs/RECIPE-N with the next free N", false},

      {KEY(split.test), fraction(),
       "fraction of the rows held out as the test set; 0: none, or the images' own (t10k-…), which "
       "need not exist otherwise"},
      {KEY(split.seed), seed, "which rows are held out"},

      {KEY(dataset.normalize), one_of({"none", "unit", "standard"}),
       "unit: pixels / 255; standard: mean 0 and deviation 1, measured on the training set"},
      {KEY(dataset.augment), one_of({"none", "flip", "crop", "flip,crop"}),
       "images, in training: mirrored at random; moved by up to an eighth of their size"},
      {KEY(dataset.classes), between(0, 255),
       "images: only these classes, renamed 0, 1, …; empty: all"},
      {KEY(dataset.keep_class), between(0, 65535),
       "classification: the class that keep_fraction is of, as it is named after dataset.classes"},
      {KEY(dataset.keep_fraction), above_0(1),
       "the part of that class's training rows that is kept, to make it rare; the test set stays"},
      {KEY(dataset.partition), one_of({"none", "range", "hash", "stratified", "weighted"}),
       "which rows go together: a virtual rank has its own range of them, or those whose key "
       "hashes to it; every batch has each key's in proportion; or rows drawn with replacement, "
       "each "
       "key as often as the others"},
      {KEY(dataset.partition_key), any(), "csv: the column that is the key; empty: the class"},
      {KEY(dataset.target), any(),
       "csv: the target column's name; a table to predict may lack the column, and one empty cell "
       "in it is as good as that"},
      {KEY(dataset.task), one_of({"regression", "classification"}),
       "csv: what the target is; classes are the whole numbers from 0"},
      {KEY(dataset.delimiter), any(), "csv: the character between columns; `\\t`: a tab"},
      {KEY(dataset.rows), between(2, 1e8), "linear-regression: rows to make"},
      {KEY(dataset.features), between(1, 1e5), "linear-regression: columns to make"},
      {KEY(dataset.noise), float_from_0(), "linear-regression: standard deviation of the noise"},
      {KEY(dataset.seed), seed, "linear-regression: seed of rows and weights"},

      {KEY(model.name), one_of({"mlp", "cnn", "resnet18", "gpt"}),
       "cnn: two convolutions and a dense layer; resnet18: with a 3 × 3 stem; both for images"},
      {KEY(model.widths), between(1, 1 << 20),
       "mlp: sizes of the hidden layers; []: a linear model"},
      {KEY(model.batch_norm), any(), "cnn: batch normalisation after each convolution"},
      {KEY(model.dropout), fraction(),
       "share of activations dropped before the last layer (gpt: wherever GPT-2 does)"},
      {KEY(model.bias), any(), "layers have a bias"},
      {KEY(model.layers), between(1, 1024), "gpt: blocks"},
      {KEY(model.heads), between(1, 1024), "gpt: of attention"},
      {KEY(model.width), between(1, 65536), "gpt: of the embeddings, a multiple of heads"},
      {KEY(model.context), between(1, 65536),
       "gpt: bytes that a prediction sees; a sample is a block of so many"},
      {KEY(model.tied), any(), "gpt: the output layer is the embedding, transposed"},

      {KEY(optimizer.name), one_of({"sgd", "momentum", "nesterov", "adam", "adamw", "closed_form"}),
       "closed_form: linear-regression's exact solution, no gradient"},
      {KEY(optimizer.lr), positive_float(), "learning rate"},
      {KEY(optimizer.momentum), float_fraction(), "momentum, nesterov"},
      {KEY(optimizer.beta1), float_fraction(), "adam, adamw"},
      {KEY(optimizer.beta2), float_fraction(), "adam, adamw"},
      {KEY(optimizer.eps), positive_float(), "adam, adamw"},
      {KEY(optimizer.weight_decay), between(0, 1e6),
       "adamw: decoupled; the others: added to the gradient"},

      {KEY(schedule.name), one_of({"constant", "linear", "cosine", "step"}),
       "linear: warm-up, then constant; cosine: warm-up, then down to min_lr"},
      {KEY(schedule.warmup_steps), between(0, 1e12), "linear, cosine: steps from 0 up to lr"},
      {KEY(schedule.min_lr), float_from_0(), "cosine: learning rate at the end"},
      {KEY(schedule.step_epochs), between(1, 1e6), "step: every so many epochs …"},
      {KEY(schedule.gamma), above_0(1), "step: … times this"},

      {KEY(loss.name), one_of({"cross_entropy", "mean_squared_error", "huber", "hinge"}),
       "hinge: two classes; mean_squared_error, huber: regression"},
      {KEY(loss.one_hot), any(), "cross_entropy: targets as one-hot rows"},
      {KEY(loss.delta), positive_float(), "huber: where the loss turns from square to linear"},

      {KEY(train.epochs), between(1, 1e6), "passes over the data"},
      {KEY(train.max_steps), between(0, 1e12), "stop after so many steps; 0: no limit"},
      {KEY(train.batch_size), between(1, 1 << 20),
       "samples a step and worker; resolved into global_batch_size", false},
      {KEY(train.global_batch_size), between(1, 1 << 30),
       "samples a step, all workers together; default: batch_size × workers.count"},
      {KEY(train.virtual_ranks), between(1, 1024),
       "fixed slices of the global batch; default: workers.count. The result depends on this, not "
       "on the number of workers"},
      {KEY(train.accumulate), between(1, 1 << 20),
       "micro-batches that the batch of a virtual rank is computed in: less memory, the same step"},
      {KEY(train.precision), one_of({"fp32", "bf16"}),
       "bf16: training's forward passes under autocast; weights and updates stay fp32"},
      {KEY(train.strategy), one_of({"shared_weights", "data_parallel", "local_sgd", "diloco"}),
       "how workers become one. shared_weights: exact and elastic; the others: a replica on each, "
       "for slow links"},
      {KEY(train.sync_every), between(1, 1e9),
       "local_sgd, diloco: steps from one meeting of the workers to the next"},
      {KEY(train.wire_format), one_of({"fp32", "bf16", "int8"}),
       "the form in which gradients or changes travel; shared_weights: between nodes alone"},
      {KEY(train.seed), seed, "first weights, order of samples, dropout"},
      {KEY(train.shuffle), any(), "a new order of samples each epoch"},
      {KEY(train.clip_grad_norm), float_from_0(), "largest norm of the gradient; 0: no clipping"},
      {KEY(train.tolerance), at_least(0),
       "stop when tolerance_of changes less from one epoch to the next; 0: off"},
      {KEY(train.tolerance_of), one_of({"loss", "gradient_norm"}), "what tolerance looks at"},
      {KEY(train.patience), between(0, 1e6),
       "stop after so many epochs in which `monitor` did not become better; 0: off"},
      {KEY(train.min_delta), float_from_0(),
       "patience: what is not better by more than this does not count"},
      {KEY(train.monitor), one_of({"test_loss", "test_accuracy"}),
       "what patience looks at and the best checkpoint is the best of"},
      {KEY(train.print_test_loss), any(), "print \"Epoch 1, Test Loss: …\" after each epoch"},

      {KEY(checkpoint.every_epochs), between(0, 1e6),
       "a checkpoint every so many epochs; 0: not for epochs"},
      {KEY(checkpoint.every_steps), between(0, 1e12),
       "a checkpoint every so many steps; 0: not for steps. With both 0 there are none"},
      {KEY(checkpoint.keep), between(1, 1e6),
       "how many of the last ones stay, besides the best one"},

      {KEY(workers.count), between(1, 1024), "processes"},
      {KEY(workers.min), between(0, 1024),
       "processes that the job can go on with; 0: workers.count"},
      {KEY(workers.threads), between(1, 1024), "threads inside each operation, each worker"},
      {KEY(workers.timeout_s), above_0(1e6),
       "seconds that a collective waits for the slowest worker"},
      {KEY(workers.hang_timeout_s), between(0, 1e6),
       "a worker that makes no progress for so many seconds while the others wait for it is "
       "replaced; 0: never"},
  };
  return keys;
}

const std::vector<Recipe>& recipes() {
  // The loss's default follows from the task; see resolve() in job.cc.
  static const std::vector<Recipe> list = {
      {"fashion-mnist", true, false, false, R"(data = "/usr/share/datasets/fashion-mnist")"},
      {"mnist", true, false, true, ""},
      {"linear-regression", false, false, false, R"(
split.test = 0.2
dataset.normalize = "none"
model.widths = []
optimizer = { name = "sgd", lr = 0.1 }
train.batch_size = 16)"},
      {"csv", false, false, true, "split.test = 0.2"},
      {"resnet18", true, false, false, R"(
data = "/usr/share/datasets/fashion-mnist"
model.name = "resnet18"
optimizer = { name = "momentum", lr = 0.05, weight_decay = 5e-4 }
schedule = { name = "cosine", warmup_steps = 20 }
train.batch_size = 32)"},
      {"gpt", false, true, false, R"(
split.test = 0.05
dataset.normalize = "none"
model.name = "gpt"
optimizer = { name = "adamw", lr = 2e-3, weight_decay = 0.1 }
schedule = { name = "cosine", warmup_steps = 50 }
train = { epochs = 1, batch_size = 16, clip_grad_norm = 1.0 })"},
  };
  return list;
}

const Key* find_key(std::string_view name) {
  const auto& keys = schema();
  const auto found = std::ranges::find(keys, name, &Key::name);
  return found == keys.end() ? nullptr : &*found;
}

bool is_section(std::string_view name) {
  return std::ranges::any_of(schema(), [&](const Key& key) {
    return key.name.size() > name.size() && key.name.starts_with(name) &&
           key.name[name.size()] == '.';
  });
}

std::string_view type_of(const Key& key) {
  constexpr std::string_view names[] = {"true or false", "an integer", "an integer",
                                        "a number",      "text",       "a list of integers"};
  return names[key.field.index()];
}

std::string value_as_toml(const Key& key, const Job& job) {
  Job copy = job;
  return std::visit([&](auto field) { return as_toml(field(copy)); }, key.field);
}

std::string toml_string(std::string_view text) { return '"' + escaped(text, "\"\\") + '"'; }

std::string printable(std::string_view text) {
  constexpr std::size_t kMostShown = 200;
  return text.size() <= kMostShown ? escaped(text, "")
                                   : escaped(text.substr(0, kMostShown), "") + "…";
}

std::string hint_for_word(std::string_view word, const std::vector<std::string>& allowed) {
  const std::string near = nearest(word, allowed);
  const std::string all = fmt::format("one of {}", fmt::join(allowed, ", "));
  return near.empty() ? all : fmt::format("did you mean \"{}\"? ({})", near, all);
}

std::string hint_for_key(std::string_view name) {
  const auto leaf_of = [](std::string_view key) { return key.substr(key.rfind('.') + 1); };
  std::vector<std::string> names, leaves;
  for (const Key& key : schema()) {
    // The right name in the wrong section is the likeliest mistake.
    if (leaf_of(key.name) == leaf_of(name) && leaf_of(name) != "name")
      return fmt::format("did you mean {}?", key.name);
    names.emplace_back(key.name);
    leaves.emplace_back(leaf_of(key.name));
    const std::string section(key.name.substr(0, key.name.find('.')));
    if (section != key.name) names.push_back(section), leaves.push_back("");
  }
  std::string near = nearest(name, names);
  if (near.empty()) {
    const std::string leaf = nearest(leaf_of(name), leaves);
    if (!leaf.empty())
      near = names[static_cast<std::size_t>(std::ranges::find(leaves, leaf) - leaves.begin())];
  }
  if (near.empty()) return "docs/job-file.md lists every key";
  return fmt::format("did you mean {}?", is_section(near) ? "[" + near + "]" : near);
}

}  // namespace lockstep::job

namespace lockstep {

const std::vector<std::string>& recipe_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> result;
    for (const auto& recipe : job::recipes()) result.push_back(recipe.name);
    return result;
  }();
  return names;
}

std::string to_toml(const Job& job) {
  std::string result;
  std::string section;
  for (const job::Key& key : job::schema()) {
    if (!key.written) continue;
    const std::size_t dot = key.name.find('.');
    if (dot != std::string_view::npos && key.name.substr(0, dot) != section) {
      section = key.name.substr(0, dot);
      result += fmt::format("\n[{}]\n", section);
    }
    const auto leaf = dot == std::string_view::npos ? key.name : key.name.substr(dot + 1);
    result += fmt::format("{} = {}\n", leaf, job::value_as_toml(key, job));
  }
  return result;
}

std::vector<std::pair<std::string, std::string>> result_settings(const Job& job) {
  std::vector<std::pair<std::string, std::string>> settings;
  for (const job::Key& key : job::schema())
    if (key.written && (!key.name.starts_with("workers.") || key.name == "workers.threads") &&
        key.name != "train.print_test_loss" && !key.name.starts_with("checkpoint."))
      settings.emplace_back(key.name, job::value_as_toml(key, job));
  return settings;
}

}  // namespace lockstep
