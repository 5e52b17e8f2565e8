// Stands in for libFuzzer in an ordinary build: runs a target over every file of the folders given.
#include <cstdio>
#include <filesystem>

#include "lockstep/base/file.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  int count = 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
      const auto bytes = lockstep::read_file(entry.path());
      std::fprintf(stderr, "%s\n", entry.path().c_str());  // the last one named is at fault
      LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
      ++count;
    }
  }
  std::printf("%d inputs\n", count);
  return count > 0 ? 0 : 1;
}
