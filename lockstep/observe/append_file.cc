#include "lockstep/observe/append_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>

#include "lockstep/observe/words.h"

namespace lockstep {
namespace {

Error cannot_write(const std::filesystem::path& path, int reason) {
  return Error(fmt::format("cannot write {}: {}{}", path.string(), errno_text(reason),
                           free_space_note(path)));
}

}  // namespace

AppendFile::AppendFile(std::filesystem::path path, std::filesystem::path named, bool keep)
    : path_(std::move(path)), named_(named.empty() ? path_ : std::move(named)) {
  const int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | (keep ? 0 : O_TRUNC);
  fd_ = UniqueFd(::open(path_.c_str(), flags, 0666));
  if (!fd_) throw cannot_write(named_, errno);
  size_ = ::lseek(fd_.get(), 0, SEEK_END);
  if (size_ < 0) throw cannot_write(named_, errno);
}

void AppendFile::append(std::span<const std::byte> record) {
  if (const int reason = write_all(fd_.get(), record)) {
    [[maybe_unused]] const int failed = ::ftruncate(fd_.get(), size_);  // shrinking needs no space
    throw cannot_write(named_, reason);
  }
  size_ += static_cast<std::int64_t>(record.size());
}

std::string free_space_note(const std::filesystem::path& path) {
  std::error_code error;
  const auto space = std::filesystem::space(
      path.has_parent_path() ? path.parent_path() : std::filesystem::path("."), error);
  return error ? "" : fmt::format(" ({} free)", words_for_bytes(space.available));
}

}  // namespace lockstep
