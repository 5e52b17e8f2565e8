// IDX content, as unpacked and as gzip: the same bytes by both ways in.
#include <unistd.h>

#include <cstdint>

#include "fuzz/target.h"
#include "lockstep/data/dataset.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  lockstep::fuzz::expect_config_error([&] { lockstep::parse_idx({data, data + size}, "input"); });
  // read_idx() looks for gzip; it wants a file.
  static const lockstep::fuzz::MemoryFile file;
  file.write(data, size);
  lockstep::fuzz::expect_config_error([&] { lockstep::read_idx(file.path()); });
  return 0;
}
