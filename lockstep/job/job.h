// A job: everything that determines a training run, and where it reads and writes. Parsed from TOML
// and the command line, checked against one schema, resolved once, written down. Plain data; any
// thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lockstep/job/nearest.h"

namespace lockstep {

struct ModelSettings {
  std::string name = "mlp";                      // mlp | cnn | resnet18 | gpt
  std::vector<std::int64_t> widths = {128, 64};  // mlp: hidden layers, possibly none
  bool batch_norm = false;                       // cnn
  double dropout = 0.0;                          // cnn, mlp: before the last layer
  bool bias = true;
  std::int64_t layers = 4;  // gpt, as the rest
  std::int64_t heads = 4;
  std::int64_t width = 128;    // of embeddings, a multiple of heads
  std::int64_t context = 128;  // bytes
  bool tied = true;            // the output layer is the embedding
};
struct OptimizerSettings {
  // sgd | momentum | nesterov | adam | adamw | closed_form (linear-regression)
  std::string name = "adam";
  double lr = 1e-3;
  double momentum = 0.9;  // momentum, nesterov
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
};
struct ScheduleSettings {
  std::string name = "constant";  // constant | linear (warm-up, then constant) | cosine | step
  std::int64_t warmup_steps = 0;  // linear, cosine: from 0 up to lr
  double min_lr = 0.0;            // cosine
  std::int64_t step_epochs = 1;   // step: every so many epochs …
  double gamma = 0.1;             // … times this
};
struct LossSettings {
  std::string name = "cross_entropy";  // cross_entropy | mean_squared_error | huber | hinge
  bool one_hot = false;                // cross_entropy with one-hot targets
  double delta = 1.0;                  // huber
};
struct DatasetSettings {
  std::string normalize = "standard";  // none | unit (bytes / 255) | standard (mean 0, deviation 1)
  std::string augment = "none";        // idx: none | flip | crop | flip,crop
  std::vector<std::int64_t> classes = {};  // idx: only these classes, renamed 0, 1, …
  std::int64_t keep_class = 0;             // classification: of this class only …
  double keep_fraction = 1.0;              // … this part of the training rows
  std::string partition = "none";          // none | range | hash | stratified | weighted
  std::string partition_key = {};          // csv: a column; empty: the class
  std::string target = {};                 // csv: the target column
  std::string task = "regression";         // csv: regression | classification
  std::string delimiter = ",";             // csv
  std::int64_t rows = 1000;                // linear-regression
  std::int64_t features = 10;              // linear-regression
  double noise = 0.1;                      // linear-regression
  std::uint64_t seed = 42;                 // linear-regression
};
struct SplitSettings {
  double test = 0.0;  // fraction held out; 0: none (or the data's own test set)
  std::uint64_t seed = 42;
};
struct TrainSettings {
  std::int64_t epochs = 10;
  std::int64_t max_steps = 0;          // 0: no limit
  std::int64_t batch_size = 64;        // a worker, at creation; after resolution: 0
  std::int64_t global_batch_size = 0;  // after resolution: > 0
  std::int64_t virtual_ranks = 0;      // after resolution: > 0
  std::int64_t accumulate = 1;         // micro-batches of a virtual rank's batch
  std::string precision = "fp32";      // fp32 | bf16
  // shared_weights | data_parallel | local_sgd | diloco
  std::string strategy = "shared_weights";
  std::int64_t sync_every = 50;      // local_sgd, diloco
  std::string wire_format = "fp32";  // fp32 | bf16 | int8
  std::uint64_t seed = 1;
  bool shuffle = true;
  double clip_grad_norm = 0.0;  // 0: off
  double tolerance = 0.0;  // 0: off; stop when tolerance_of changes less from one epoch to the next
  std::string tolerance_of = "loss";  // loss | gradient_norm
  std::int64_t patience = 0;          // 0: off; epochs without progress
  double min_delta = 0.0;             // what counts as progress
  std::string monitor = "test_loss";  // test_loss | test_accuracy
  bool print_test_loss = false;       // "Epoch 1, Test Loss: …" lines
};
struct CheckpointSettings {
  std::int64_t every_epochs = 1;  // 0: never
  std::int64_t every_steps = 0;   // 0: never
  std::int64_t keep = 1;          // the last so many, besides the best one
};
struct WorkerSettings {
  std::int64_t count = 1;
  std::int64_t min = 0;          // that the job can go on with; 0: count
  std::int64_t threads = 1;      // intra-op, each
  double timeout_s = 300.0;      // of every collective
  double hang_timeout_s = 60.0;  // 0: who hangs is not looked for
};

struct Job {
  std::string recipe;  // fashion-mnist | mnist | linear-regression | csv | resnet18 | gpt
  std::string data;    // folder or file; "" where the recipe makes its own
  std::string output;  // folder; "" = runs/RECIPE-N, the next free N
  SplitSettings split;
  DatasetSettings dataset;
  ModelSettings model;
  OptimizerSettings optimizer;
  ScheduleSettings schedule;
  LossSettings loss;
  TrainSettings train;
  CheckpointSettings checkpoint;
  WorkerSettings workers;
};

// One setting that overrides the file, e.g. {"optimizer.lr", "1e-4", "--set"} or {"workers.count",
// "2", "--workers"}. The value is TOML; a bare word counts as a string.
struct Override {
  std::string key;
  std::string value;
  std::string where;  // for messages: the flag that set it
};

// Recipe's name or a job file's path -> a checked, resolved job (global_batch_size, virtual_ranks,
// absolute data path, the recipe's defaults). Throws ConfigError: one line naming the key, where it
// was set (file:line or flag), and a hint (the nearest key or value, the allowed range).
Job resolve_job(const std::string& name_or_path, const std::vector<Override>& overrides);
// The same from TOML text, for tests, fuzzing and workers. `where` names it in messages.
Job parse_job(std::string_view toml, const std::string& where,
              const std::vector<Override>& overrides = {});

// The resolved job as TOML, every key, without `output`: what is written down.
// parse_job(to_toml(job)) equals job (but for `output`).
std::string to_toml(const Job& job);

// Every setting that the result depends on, in the schema's order, with its value as TOML.
std::vector<std::pair<std::string, std::string>> result_settings(const Job& job);

const std::vector<std::string>& recipe_names();

}  // namespace lockstep
