// File descriptors that close themselves, and files that are written whole or not at all.
// Errors: Error for the system's (names path, action and reason); callers turn a user's wrong path
// into ConfigError.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lockstep {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~UniqueFd();
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// The whole regular file. Throws Error("cannot read PATH: No such file or directory").
std::vector<std::byte> read_file(const std::filesystem::path& path);
std::string read_text_file(const std::filesystem::path& path);

// Writes to a temporary file beside PATH, syncs it, renames it over PATH and syncs the folder: PATH
// holds the old or the new content, never part of one. On failure removes the temporary file and
// throws Error("cannot write PATH: …"). The mode is cut by the umask.
void write_file_atomically(const std::filesystem::path& path,
                           std::span<const std::span<const std::byte>> pieces,
                           unsigned mode = 0666);
void write_file_atomically(const std::filesystem::path& path, std::string_view text,
                           unsigned mode = 0666);

// Makes what was created in, renamed in or removed from a folder durable. A folder that may be
// written but not read can't be synced, which is no failure. Throws Error.
void sync_folder(const std::filesystem::path& folder);

// Writes all bytes to a descriptor, going on after EINTR and short writes. Returns 0 or the errno.
int write_all(int fd, std::span<const std::byte> bytes);

inline std::span<const std::byte> as_byte_span(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

}  // namespace lockstep
