// The folder of a training run. Made early, so that a folder that cannot be written is refused
// before any work; filled only by begin(). A run that fails before leaves nothing: what was made
// for it goes again. One thread.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "lockstep/base/file.h"

namespace lockstep {

class OutputFolder {
 public:
  // Throws ConfigError: it exists (unless empty, or `overwrite` and an earlier run's), cannot be
  // made, cannot be written to.
  static OutputFolder at(const std::filesystem::path& path, bool overwrite);
  // PARENT/NAME-N with the first free N.
  static OutputFolder next_free(const std::filesystem::path& parent, const std::string& name);

  // An earlier run's, to go on with: begin() leaves it as it is. Throws ConfigError: there is no
  // run, it cannot be written to, another process is at it.
  static OutputFolder resume(const std::filesystem::path& path);

  OutputFolder(OutputFolder&&) = default;
  OutputFolder& operator=(OutputFolder&&) = delete;
  ~OutputFolder();

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path checkpoints() const { return path_ / "checkpoints"; }
  // Removes the files of an earlier run and writes job.toml; checkpoints are the workers', who may
  // have begun with theirs. Throws Error.
  void begin(const std::string& job);

 private:
  explicit OutputFolder(std::filesystem::path path) : path_(std::move(path)) {}
  void make(const std::filesystem::path& folder);
  void lock();

  std::filesystem::path path_;
  std::vector<std::filesystem::path> made_;  // folders, outermost first; until begin()
  bool resumed_ = false;
  UniqueFd lock_;  // of the folder, while a run goes on in it
};

// Throws ConfigError unless a file could be made at `path` (given by `flag`).
void check_writable_place(const std::filesystem::path& path, const std::string& flag);
// Throws ConfigError if `path` is a file of the run in `folder`, its report aside.
void refuse_file_of_a_run(const std::filesystem::path& path, const std::filesystem::path& folder,
                          const std::string& flag);

}  // namespace lockstep
