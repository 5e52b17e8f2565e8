// The manifest of a checkpoint. What is accepted lies inside its shards, and is written back as it
// was.
#include <cstdint>
#include <span>

#include "fuzz/target.h"
#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"
#include "lockstep/checkpoint/manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  lockstep::fuzz::expect_config_error([&] {
    const lockstep::Manifest manifest = lockstep::parse_manifest(text, "input");
    for (const auto& tensor : manifest.tensors)
      LOCKSTEP_CHECK(
          lockstep::in_bounds(tensor.offset, tensor.bytes, manifest.shards.at(tensor.shard).bytes));
    const std::string again = lockstep::manifest_text(manifest);
    LOCKSTEP_CHECK(lockstep::manifest_text(lockstep::parse_manifest(again, "again")) == again);
  });
  return 0;
}
