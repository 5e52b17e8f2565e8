// A whole safetensors file. Every byte that a view shows must be readable.
#include <cstdint>
#include <span>

#include "fuzz/target.h"
#include "lockstep/base/error.h"
#include "lockstep/checkpoint/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  lockstep::fuzz::expect_config_error([&] {
    const auto file = lockstep::SafetensorsFile::parse({bytes.begin(), bytes.end()}, "input");
    unsigned sum = 0;
    for (const lockstep::TensorView& tensor : file.tensors()) {
      LOCKSTEP_CHECK(file.find(tensor.name) != nullptr);
      for (const std::byte byte : tensor.bytes) sum += std::to_integer<unsigned>(byte);
    }
    LOCKSTEP_CHECK(sum <= 255 * bytes.size());
  });
  return 0;
}
