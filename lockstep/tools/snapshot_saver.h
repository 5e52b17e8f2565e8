// Writes the model that a worker shows in the segment to model.safetensors. A snapshot that arrives
// soon after another replaces it. One thread.
#pragma once

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "lockstep/memory/segment.h"

namespace lockstep {

class SnapshotSaver {
 public:
  SnapshotSaver(std::filesystem::path file, std::shared_ptr<Segment> segment)
      : file_(std::move(file)), segment_(std::move(segment)) {}

  void take(const nlohmann::json& event) { pending_ = event; }
  // Writes the snapshot last taken, if it has not been written. Throws Error: it does not lie in
  // the segment, the file cannot be written.
  void save();
  // Of the file; "" before the first.
  const std::string& sha256() const { return sha256_; }
  const std::filesystem::path& file() const { return file_; }

 private:
  std::filesystem::path file_;
  std::shared_ptr<Segment> segment_;
  nlohmann::json pending_;
  std::string sha256_;
};

}  // namespace lockstep
