#include "lockstep/tools/output_folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/cluster/control_file.h"
#include "lockstep/observe/append_file.h"
#include "lockstep/observe/run_log.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr std::array kRunFiles = {
    "job.toml",     "report.json",       "metrics.jsonl",        kHistoryFile,  "report.html",
    "control.json", "model.safetensors", "flight_recorder.json", "checkpoints", kControlFile};

bool belongs_to_a_run(const fs::path& name) {
  return std::find(kRunFiles.begin(), kRunFiles.end(), name) != kRunFiles.end() ||
         name.string().starts_with("events.out.tfevents.");
}

void refuse_unwritable(const fs::path& folder, const std::string& what) {
  if (::access(folder.c_str(), W_OK | X_OK) != 0)
    throw ConfigError(
        fmt::format("cannot write to {} {}: {}", what, folder.string(), errno_text(errno)));
}

void refuse_taken(const fs::path& path, bool overwrite) {
  std::error_code error;
  if (!fs::is_directory(path, error))
    throw ConfigError(fmt::format("output folder {} is not a folder", path.string()));
  bool empty = true;
  for (const fs::directory_entry& entry : fs::directory_iterator(path, error)) {
    empty = false;
    if (overwrite && !belongs_to_a_run(entry.path().filename()) && !fs::exists(path / "job.toml"))
      throw ConfigError(fmt::format("output folder {} holds {} and no earlier run", path.string(),
                                    entry.path().filename().string()),
                        "--overwrite replaces the files of a run and nothing else");
  }
  if (error)
    throw ConfigError(
        fmt::format("cannot read output folder {}: {}", path.string(), error.message()));
  if (!empty && !overwrite)
    throw ConfigError(fmt::format("output folder {} exists", path.string()),
                      "name another with --output, or replace the run in it with --overwrite");
}

}  // namespace

// Makes one folder; throws ConfigError for reasons that are the user's, Error for the machine's.
// Does nothing if it exists.
void OutputFolder::make(const fs::path& folder) {
  if (::mkdir(folder.c_str(), 0777) == 0) {
    made_.push_back(folder);
    return;
  }
  const int reason = errno;
  if (reason == EEXIST) return;
  const std::string message =
      fmt::format("cannot make output folder {}: {}", path_.string(), errno_text(reason));
  if (reason == ENOSPC || reason == EDQUOT || reason == EIO)
    throw Error(message + free_space_note(folder));
  throw ConfigError(message);
}

OutputFolder OutputFolder::at(const fs::path& path, bool overwrite) {
  if (path.empty()) throw ConfigError("the output folder has no name", "--output DIR");
  OutputFolder folder(path);
  fs::path part;
  for (const fs::path& name : path) {
    part /= name;
    folder.make(part);
  }
  if (folder.made_.empty() || folder.made_.back() != part) refuse_taken(path, overwrite);
  refuse_unwritable(path, "output folder");
  return folder;
}

OutputFolder OutputFolder::next_free(const fs::path& parent, const std::string& name) {
  OutputFolder folder(parent);
  folder.make(parent);
  refuse_unwritable(parent, "folder");
  for (int number = 1;; ++number) {
    const std::size_t before = folder.made_.size();
    folder.path_ = parent / fmt::format("{}-{}", name, number);
    folder.make(folder.path_);  // two runs at once: one of them makes it, the other goes on
    if (folder.made_.size() > before) return folder;
  }
}

OutputFolder OutputFolder::resume(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path / "job.toml", error))
    throw ConfigError(fmt::format("there is no run in {} to resume", path.string()),
                      "the output folder of lockstep train");
  OutputFolder folder(path);
  folder.resumed_ = true;
  refuse_unwritable(path, "output folder");
  folder.lock();
  return folder;
}

// The kernel takes the lock back when the process ends, however it ends.
void OutputFolder::lock() {
  lock_ = UniqueFd(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (lock_ && ::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    throw ConfigError(fmt::format("another lockstep train is at work in {}", path_.string()),
                      "wait for its end");
}

OutputFolder::~OutputFolder() {
  std::error_code ignored;  // one that is not empty holds somebody else's files
  for (auto folder = made_.rbegin(); folder != made_.rend(); ++folder) fs::remove(*folder, ignored);
}

void OutputFolder::begin(const std::string& job) {
  if (resumed_) return;
  lock();
  const fs::path job_file = path_ / "job.toml";
  std::vector<fs::path> old;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_))
    if (belongs_to_a_run(entry.path().filename()) && entry.path() != job_file &&
        entry.path() != checkpoints() && entry.path().filename() != kControlFile)
      old.push_back(entry.path());
  for (const fs::path& file : old) {
    std::error_code error;
    fs::remove(file, error);
    if (error) throw Error(fmt::format("cannot remove {}: {}", file.string(), error.message()));
  }
  with_free_space_note(job_file, [&] { write_file_atomically(job_file, job); });
  made_.clear();
}

void check_writable_place(const fs::path& path, const std::string& flag) {
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  std::error_code error;
  if (fs::is_directory(path, error))
    throw ConfigError(fmt::format("{} {} is a folder", flag, path.string()), "name a file");
  if (!fs::is_directory(folder, error))
    throw ConfigError(
        fmt::format("{} {}: there is no folder {}", flag, path.string(), folder.string()));
  refuse_unwritable(folder, "folder");
}

void refuse_file_of_a_run(const fs::path& path, const fs::path& folder, const std::string& flag) {
  std::error_code error;  // what cannot be resolved does not exist
  const fs::path real = fs::weakly_canonical(path, error), of = fs::weakly_canonical(folder, error);
  if (real.parent_path() == of && belongs_to_a_run(real.filename()) &&
      real.filename() != "report.json")
    throw ConfigError(fmt::format("{} {} is a file of the run itself", flag, path.string()),
                      "name another file");
}

}  // namespace lockstep
