// lockstep predict: a trained model applied to data, split over workers; every row once, in order.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "lockstep/base/file.h"
#include "lockstep/job/job.h"
#include "lockstep/observe/append_file.h"
#include "lockstep/tools/commands.h"
#include "lockstep/tools/job_workers.h"
#include "lockstep/tools/output_folder.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

// The blocks of all workers, put in order into a temporary file that becomes PATH when all are in.
class PredictionFile {
 public:
  explicit PredictionFile(fs::path path)
      : path_(std::move(path)),
        temporary_(fmt::format("{}.tmp-{}", path_.string(), ::getpid())),
        file_(std::in_place, temporary_, path_) {}
  ~PredictionFile() {
    std::error_code ignored;
    if (file_) fs::remove(temporary_, ignored);
  }
  PredictionFile(const PredictionFile&) = delete;
  PredictionFile& operator=(const PredictionFile&) = delete;

  void take(std::uint64_t block, std::string text) {
    if (block < next_ || !waiting_.emplace(block, std::move(text)).second)
      throw Error(fmt::format("block {} of the predictions came twice", block));
    for (auto first = waiting_.begin(); first != waiting_.end() && first->first == next_;
         first = waiting_.erase(first), ++next_)
      file_->append(as_byte_span(first->second));
  }
  void finish() {
    if (next_ == 0 || !waiting_.empty())
      throw Error(fmt::format("block {} of the predictions is missing", next_));
    const UniqueFd fd(::open(temporary_.c_str(), O_WRONLY | O_CLOEXEC));
    if (!fd || ::fsync(fd.get()) != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0)
      throw Error(fmt::format("cannot write {}: {}{}", path_.string(), errno_text(errno),
                              free_space_note(path_)));
    file_.reset();
  }

 private:
  fs::path path_, temporary_;
  std::optional<AppendFile> file_;  // until it is renamed
  std::uint64_t next_ = 0;
  std::map<std::uint64_t, std::string> waiting_;
};

struct PredictFlags {
  std::string folder, data, output;
  std::optional<int> workers;
  bool quiet = false, overwrite = false;
};

void check(const PredictFlags& flags) {
  const auto need = [](const std::string& value, const char* what) {
    if (value.empty())
      throw ConfigError(fmt::format("no {} given", what),
                        "lockstep predict runs/first --data table.csv --output predictions.csv");
  };
  need(flags.folder, "run's folder");
  need(flags.output, "--output");
  std::error_code error;
  if (!fs::is_directory(flags.folder, error))
    throw ConfigError(fmt::format("there is no folder {}", flags.folder),
                      "the output folder of lockstep train");
  for (const char* name : {"job.toml", "model.safetensors"})
    if (!fs::exists(fs::path(flags.folder) / name, error))
      throw ConfigError(fmt::format("{} holds no {}", flags.folder, name),
                        "the output folder of a run of lockstep train that has ended an epoch");
  if (flags.workers && (*flags.workers < 1 || *flags.workers > kMaxSeats))
    throw ConfigError(fmt::format("--workers {} is not from 1 to {}", *flags.workers, kMaxSeats));
  check_writable_place(flags.output, "--output");
  refuse_file_of_a_run(flags.output, flags.folder, "--output");
  if (fs::exists(flags.output, error) && !flags.overwrite)
    throw ConfigError(fmt::format("--output {} exists", flags.output),
                      "name another file, or replace it with --overwrite");
}

Job job_of(const PredictFlags& flags) {
  const std::string path = (fs::path(flags.folder) / "job.toml").string();
  Job job = parse_job(as_input([&] { return read_text_file(path); }), path);
  if (flags.data.empty() && !job.data.empty())
    throw ConfigError("no --data given",
                      "lockstep predict runs/first --data table.csv --output predictions.csv");
  if (flags.workers) job.workers.count = *flags.workers;
  // Virtual ranks are training's; any number of workers may predict.
  job.train.virtual_ranks = std::max(job.train.virtual_ranks, job.workers.count);
  job.train.global_batch_size = std::max(job.train.global_batch_size, job.train.virtual_ranks);
  return job;
}

}  // namespace

int predict_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app("Applies a trained model to data, split over workers: a line a row, in order.",
               "lockstep predict");
  PredictFlags flags;
  app.option_defaults()->take_last();
  app.add_option("DIR", flags.folder, "the output folder of lockstep train");
  app.add_option("--data", flags.data,
                 "the data: as for training, targets may be missing; where a recipe makes its own "
                 "data, by default its test set");
  app.add_option("--output", flags.output, "the CSV file to write");
  app.add_option("--workers", flags.workers, "processes; default: as in training");
  app.add_flag("--quiet", flags.quiet, "print nothing");
  app.add_flag("--overwrite", flags.overwrite, "replace the output file");
  if (!parse_arguments(app, arguments)) return 0;
  check(flags);

  WorkerJob run;
  run.command = "predict";
  run.job = job_of(flags);
  run.agent.segment = Segment::create({.seats = static_cast<int>(run.job.workers.count)});
  run.agent.environment["LOCKSTEP_WEIGHTS"] =
      fs::absolute(fs::path(flags.folder) / "model.safetensors").string();
  run.agent.environment["LOCKSTEP_PREDICT_DATA"] =
      flags.data.empty() ? "" : fs::absolute(flags.data).string();
  PredictionFile file(flags.output);
  run.agent.on_event = [&](int, const nlohmann::json& event) {
    if (event.at("event") == "predictions") file.take(event.at("block"), event.at("text"));
    if (event.at("event") == "message" && !flags.quiet)
      print(event.at("text").get_ref<const std::string&>() + "\n");
  };
  run.agent.on_line = [&](int rank, bool error, std::string_view line) {
    const std::string text = fmt::format("[rank {}] {}\n", rank, line);
    if (error)
      print_error(text);
    else if (!flags.quiet)
      print(text);
  };
  run_worker_job(run);
  file.finish();
  if (!flags.quiet) print(fmt::format("predictions: {}\n", flags.output));
  return 0;
}

}  // namespace lockstep
