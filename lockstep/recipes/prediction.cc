#include <ATen/core/grad_mode.h>
#include <ATen/ops/softmax.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <tuple>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/observe/event.h"
#include "lockstep/recipes/loss.h"
#include "lockstep/recipes/model.h"
#include "lockstep/recipes/recipe.h"
#include "lockstep/recipes/saved_model.h"
#include "lockstep/recipes/text.h"

namespace lockstep {
namespace {

constexpr std::uint64_t kBlockRows = 1000;

// The rows to predict, labels included where there are any.
Dataset load_rows(const Job& job, const std::filesystem::path& data, const SavedInput& input) {
  if (data.empty()) return load_recipe_data(job).sets.test;
  if (!input.columns.empty())
    return load_csv(data, {.target = job.dataset.target,
                           .classification = job.dataset.task == "classification",
                           .target_optional = true,
                           .delimiter = job.dataset.delimiter[0],
                           .features = input.columns});
  Dataset images = load_idx_images(data);
  // Trained on some of the classes, under other names: every row is predicted, the labels mean
  // nothing here.
  if (!job.dataset.classes.empty()) images.classes.clear();
  return images;
}

std::string header_of(const Job& job, bool classes) {
  if (!classes) return "row,prediction\n";
  return job.loss.name == "hinge" ? "row,prediction,score\n" : "row,prediction,probability\n";
}

// CSV lines for what the model says of a batch whose first row is `row`.
std::string lines_of(const Job& job, bool classes, std::uint64_t row, const at::Tensor& output) {
  const std::vector<std::int64_t>& kept = job.dataset.classes;  // renamed in training: undo
  at::Tensor score = output, index;
  if (job.loss.name == "hinge")
    index = output.gt(0).to(at::kLong);
  else if (classes)
    std::tie(score, index) = at::softmax(output, 1).max(1);
  std::string text;
  for (std::int64_t i = 0; i < output.size(0); ++i, ++row) {
    fmt::format_to(std::back_inserter(text), "{},", row);
    if (classes) {
      const std::int64_t found = index.const_data_ptr<std::int64_t>()[i];
      fmt::format_to(std::back_inserter(text), "{},",
                     kept.empty() ? found : kept[static_cast<std::size_t>(found)]);
    }
    fmt::format_to(std::back_inserter(text), "{}\n", score.const_data_ptr<float>()[i]);
  }
  return text;
}

// Outputs of the trained model: the extent of its last bias-like tensor, the output layer's weight.
std::int64_t outputs_of(const Job& job, const SafetensorsFile& file, const std::string& path) {
  const std::string name = job.model.name != "mlp"
                               ? "output.weight"
                               : fmt::format("layer{}.weight", job.model.widths.size() + 1);
  const TensorView* weight = file.find(name);
  if (weight == nullptr || weight->shape.size() != 2)
    throw ConfigError(fmt::format("{}: tensor {} is missing", path, name),
                      "the model in job.toml beside it must be the one that was trained");
  return weight->shape[0];
}

void report(const World& world, std::uint64_t rows, bool labelled, double correct) {
  world.group().all_reduce(std::as_writable_bytes(std::span(&correct, 1)), Dtype::float64,
                           Reduction::sum, {.tag = "right predictions"});
  if (world.rank() != 0) return;
  std::string text = fmt::format("{} rows", rows);
  if (labelled)
    text += fmt::format(", {:.0f} of them predicted right: accuracy {:.4f}", correct,
                        correct / static_cast<double>(rows));
  world.events().emit({{"event", "message"}, {"text", text}});
}

// gpt's prediction: the text in `data` and more of it. One rank's work.
void continue_text(const World& world, const Job& job, const SafetensorsFile& file,
                   const std::filesystem::path& weights, const std::filesystem::path& data) {
  constexpr std::int64_t kLength = 1000;
  if (world.rank() != 0) return;
  const Model model = make_model(job.model, {}, kByteValues, job.train.seed);
  load_module(*model.module, file, weights.string());
  model.module->eval();
  std::string prompt;
  if (!data.empty())
    prompt = as_input([&] { return read_text_file(data); }, "a file with the text to go on from");
  const std::string text = generate(model, job.model.context, prompt, kLength, job.train.seed);
  // Bytes that are no UTF-8 become U+FFFD, as an event is JSON.
  const std::string valid =
      nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  world.events().emit(
      {{"event", "predictions"}, {"block", 0}, {"text", nlohmann::json::parse(valid)}});
}

}  // namespace

void run_prediction(const World& world, const Job& job, const std::filesystem::path& weights,
                    const std::filesystem::path& data) {
  const SafetensorsFile file = SafetensorsFile::read(weights);
  if (job.model.name == "gpt") return continue_text(world, job, file, weights, data);
  const SavedInput input = read_input_tensors(file, weights.string());
  const Dataset rows = load_rows(job, data, input);
  if (rows.rows == 0) throw ConfigError(fmt::format("{}: no rows to predict", rows.source));
  const bool classes = job.loss.name == "cross_entropy" || job.loss.name == "hinge";
  const std::int64_t outputs = outputs_of(job, file, weights.string());
  const Objective objective = make_objective(job.loss, !classes                   ? 0
                                                       : job.loss.name == "hinge" ? 2
                                                                                  : outputs);
  const Model model = make_model(job.model, rows.sample_shape, outputs, job.train.seed);
  load_module(*model.module, file, weights.string());
  model.module->eval();
  if (input.normalization.mean.size() != 1 &&
      static_cast<std::int64_t>(input.normalization.mean.size()) != rows.sample_size())
    throw ConfigError(fmt::format("{}: {} columns, the model was trained on {}", rows.source,
                                  rows.sample_size(), input.normalization.mean.size()));

  const DatasetBatches batches(rows, input.normalization, objective.target_form);
  const bool labelled = !rows.classes.empty() && objective.correct;
  const std::uint64_t blocks = (rows.rows + kBlockRows - 1) / kBlockRows;
  double correct = 0;
  at::NoGradGuard no_grad;
  std::vector<std::uint64_t> indices;
  for (auto block = static_cast<std::uint64_t>(world.rank()); block < blocks;
       block += static_cast<std::uint64_t>(world.size())) {
    const std::uint64_t first = block * kBlockRows;
    indices.resize(std::min(kBlockRows, rows.rows - first));
    std::iota(indices.begin(), indices.end(), first);
    const Batch batch = batches.batch(indices);
    const at::Tensor output = model.forward(batch.input).contiguous();
    if (labelled) correct += static_cast<double>(objective.correct(output, batch.target));
    world.events().emit({{"event", "predictions"},
                         {"block", block},
                         {"text", (block == 0 ? header_of(job, classes) : "") +
                                      lines_of(job, classes, first, output)}});
  }
  report(world, rows.rows, labelled, correct);
}

}  // namespace lockstep
