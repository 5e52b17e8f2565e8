// A file of records that only grows and only by whole records: what cannot be written whole is
// taken back. One thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"

namespace lockstep {

class AppendFile {
 public:
  // Creates the file, and empties it unless `keep`. `named`: what errors call it, if not its path.
  // Throws Error.
  explicit AppendFile(std::filesystem::path path, std::filesystem::path named = {},
                      bool keep = false);
  // Throws Error naming the file, the reason and the free space; the file ends with its last whole
  // record then.
  void append(std::span<const std::byte> record);
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_, named_;
  UniqueFd fd_;
  std::int64_t size_ = 0;
};

// " (12.3 kB free)" for the file system that holds `path`, or "".
std::string free_space_note(const std::filesystem::path& path);

// Runs `write`; an Error that leaves it also says how much space is left where `path` lies.
template <typename Write>
auto with_free_space_note(const std::filesystem::path& path, const Write& write) {
  try {
    return write();
  } catch (const Error& error) {
    throw Error(error.what() + free_space_note(path));
  }
}

}  // namespace lockstep
