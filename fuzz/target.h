// What the fuzz targets share. A reader may refuse its input with a ConfigError of one line; any
// other exception, and any fault, is a finding.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "lockstep/base/error.h"

namespace lockstep::fuzz {

template <typename Action>
void expect_config_error(Action action) {
  try {
    action();
  } catch (const ConfigError& error) {
    LOCKSTEP_CHECK(std::string(error.what()).find('\n') == std::string::npos, error.what());
  }
}

// A file that is nowhere in a file system.
class MemoryFile {
 public:
  MemoryFile() : fd_(::memfd_create("fuzz", MFD_CLOEXEC)) { LOCKSTEP_CHECK(fd_ >= 0); }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  void write(const std::uint8_t* data, std::size_t size) const {
    LOCKSTEP_CHECK(::ftruncate(fd_, 0) == 0);
    LOCKSTEP_CHECK(::pwrite(fd_, data, size, 0) == static_cast<ssize_t>(size));
  }
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

}  // namespace lockstep::fuzz
