// Checkpoints: a folder for each step, DIR/step-00000123, with the tensors in safetensors files
// ("shards") and manifest.json (manifest.h), which is written last. The folder gets its name when
// all in it is synced: a checkpoint exists whole or not at all. Names, shapes and bytes; knows no
// modules.
//
// One process at a time writes to a DIR; any number may read. Any thread, one at a time per object.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/checkpoint/manifest.h"
#include "lockstep/checkpoint/safetensors.h"

namespace lockstep {

struct CheckpointContents {
  std::uint64_t step = 0;
  std::string state = "{}";  // a JSON object: epoch, job, counts, …; comes back as it was given
  std::vector<TensorView> tensors;
};

struct CheckpointOptions {
  int keep = 0;  // this step and so many of the steps before it less one; 0: all
  std::vector<std::uint64_t> keep_also = {};             // such as the best one
  std::uint64_t shard_bytes = std::uint64_t{512} << 20;  // a larger tensor has a shard of its own
};

// DIR/step-00000123, which need not exist.
std::filesystem::path checkpoint_path(const std::filesystem::path& folder, std::uint64_t step);

// Makes `folder` where there is none; takes the place of an older checkpoint of the same step at
// once. Steps that it outlives by `keep` are removed when it is whole; later steps, of a run that
// was begun again from an earlier one, stay. Returns its path. Throws Error (disk full, no
// permission, a tensor name there twice); then everything is as it was.
std::filesystem::path write_checkpoint(const std::filesystem::path& folder,
                                       const CheckpointContents& contents,
                                       const CheckpointOptions& options = {});

class Checkpoint {
 public:
  // `path`: one step's folder. Reads all of it once to compare sizes and checksums. Throws
  // ConfigError, with a hint, naming the file that is missing, cut short, changed or not
  // lockstep's.
  static Checkpoint open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  std::uint64_t step() const { return manifest_.step; }
  const std::string& state() const { return manifest_.state; }
  const std::vector<Manifest::Tensor>& tensors() const { return manifest_.tensors; }  // by name
  const Manifest::Tensor* find(std::string_view name) const;  // nullptr: there is none
  // Fills `out`, which has the tensor's size, and compares its checksum again. Throws ConfigError:
  // there is no such tensor, another size, changed since open().
  void read(std::string_view name, std::span<std::byte> out) const;

 private:
  std::filesystem::path path_;
  Manifest manifest_;
};

struct NewestCheckpoint {
  std::optional<Checkpoint> checkpoint;  // nothing: there is no whole one
  std::vector<std::string> skipped;      // newer ones that are broken: what is wrong with each
};
// The whole checkpoint of the highest step in a folder; one that does not exist holds none.
NewestCheckpoint newest_checkpoint(const std::filesystem::path& folder);

}  // namespace lockstep
