// The manifest of a checkpoint: which tensors it holds, where their bytes lie, what they hash to,
// and the state of whoever saved it. Text in, text out: knows no files. Any thread.
//
// JSON: {"format": "lockstep checkpoint", "version": 1, "step", "state": {…},
//        "shards": [{"file", "bytes", "sha256"}],
//        "tensors": [{"name", "dtype", "shape", "shard", "offset", "sha256"}], "sha256"}
// Names and dtypes as in safetensors; "shard" counts from 0, "offset" from the start of its file.
// The last member is the hash of all others.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/dtype.h"

namespace lockstep {

struct Manifest {
  struct Shard {
    std::string file;
    std::uint64_t bytes = 0;
    std::string sha256;
  };
  struct Tensor {
    std::string name;
    Dtype dtype = Dtype::float32;
    std::vector<std::int64_t> shape;
    std::uint64_t shard = 0;   // < shards.size()
    std::uint64_t offset = 0;  // bytes; the tensor ends within its shard
    std::uint64_t bytes = 0;
    std::string sha256;
  };
  std::uint64_t step = 0;
  std::string state = "{}";  // a JSON object
  std::vector<Shard> shards;
  std::vector<Tensor> tensors;  // sorted by name
};

// "shard-00002.safetensors": the one name that a shard may have.
std::string shard_name(std::uint64_t shard);

// The same manifest gives the same text. Throws Error: a state that is no JSON object, a name that
// is not UTF-8.
std::string manifest_text(const Manifest& manifest);
// Throws ConfigError naming the file and what is wrong with it: not JSON, another program's,
// another version's, a member that is missing or does not fit the others, changed since it was
// written.
Manifest parse_manifest(std::string_view text, const std::string& name_for_errors);

}  // namespace lockstep
