#include "lockstep/base/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

Error cannot(const char* action, const fs::path& path, int error_number) {
  return Error(std::string("cannot ") + action + " " + path.string() + ": " +
               errno_text(error_number));
}

// Into a container of one-byte elements. Grows as it reads: the size that fstat tells is a hint (0
// for /proc, stale for a growing file).
template <typename Container>
Container read_whole(const fs::path& path) {
  // Not to wait for the other end of a FIFO.
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status {};
  if (!fd || ::fstat(fd.get(), &status) != 0) throw cannot("read", path, errno);
  if (S_ISDIR(status.st_mode)) throw cannot("read", path, EISDIR);
  if (!S_ISREG(status.st_mode))
    throw Error("cannot read " + path.string() + ": it is no regular file");
  Container out;
  out.resize(static_cast<std::size_t>(status.st_size) + 1);  // one more, to see the end at once
  std::size_t used = 0;
  for (;;) {
    if (used == out.size()) out.resize(used < 4096 ? 8192 : 2 * used);
    const ssize_t count = ::read(fd.get(), out.data() + used, out.size() - used);
    if (count < 0 && errno != EINTR) throw cannot("read", path, errno);
    if (count == 0) break;
    used += static_cast<std::size_t>(std::max<ssize_t>(count, 0));
  }
  out.resize(used);
  return out;
}

// A temporary file that is removed unless it was renamed to its final place.
class TemporaryFile {
 public:
  // Opens PATH.tmp-PID-N for the first free N: never touches a file that exists. Mode as the umask
  // says, unlike mkstemp's 0600.
  TemporaryFile(const fs::path& target, unsigned mode) {
    for (int n = 0; n < 1000; ++n) {
      name_ = target.string() + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(n);
      fd_ = UniqueFd(::open(name_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode));
      if (fd_ || errno != EEXIST) break;
    }
    if (!fd_) throw cannot("write", target, errno);
  }
  ~TemporaryFile() {
    if (fd_) ::unlink(name_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  int fd() const { return fd_.get(); }
  // Returns 0 or the errno.
  int rename_to(const fs::path& target) {
    if (::rename(name_.c_str(), target.c_str()) != 0) return errno;
    fd_ = UniqueFd();
    return 0;
  }

 private:
  std::string name_;
  UniqueFd fd_;
};

}  // namespace

UniqueFd::~UniqueFd() {
  if (fd_ >= 0) ::close(fd_);
}

std::vector<std::byte> read_file(const fs::path& path) {
  return read_whole<std::vector<std::byte>>(path);
}

std::string read_text_file(const fs::path& path) { return read_whole<std::string>(path); }

void write_file_atomically(const fs::path& path,
                           std::span<const std::span<const std::byte>> pieces, unsigned mode) {
  TemporaryFile temporary(path, mode);
  for (const auto piece : pieces)
    if (const int error = write_all(temporary.fd(), piece)) throw cannot("write", path, error);
  if (::fsync(temporary.fd()) != 0) throw cannot("write", path, errno);
  if (const int error = temporary.rename_to(path)) throw cannot("write", path, error);
  sync_folder(path.parent_path());  // the rename itself is durable once the folder is
}

void sync_folder(const fs::path& folder) {
  const fs::path path = folder.empty() ? fs::path(".") : folder;
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd && ::fsync(fd.get()) != 0 && errno != EINVAL) throw cannot("write", path, errno);
}

void write_file_atomically(const fs::path& path, std::string_view text, unsigned mode) {
  const std::array<std::span<const std::byte>, 1> pieces{as_byte_span(text)};
  write_file_atomically(path, pieces, mode);
}

int write_all(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno;
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
  return 0;
}

}  // namespace lockstep
