#include "lockstep/checkpoint/checkpoint.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fstream>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "step-";
constexpr std::string_view kTemporary = ".tmp-";  // followed by the writer's process id
constexpr const char* kManifest = "manifest.json";
constexpr const char* kHint = "another checkpoint, or train from the start";

std::optional<std::uint64_t> number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Steps of the folders that have a checkpoint's name, highest first.
std::vector<std::uint64_t> steps_in(const fs::path& folder) {
  std::vector<std::uint64_t> steps;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kPrefix)) continue;
    const auto step = number(std::string_view(name).substr(kPrefix.size()));
    if (step && checkpoint_path(folder, *step).filename() == name) steps.push_back(*step);
  }
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

fs::path temporary_path(const fs::path& folder, std::uint64_t step) {
  return fmt::format("{}{}{}", checkpoint_path(folder, step).string(), kTemporary, ::getpid());
}

// A folder that vanishes with its owner unless it was renamed.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(fs::path path) : path_(std::move(path)) {
    std::error_code error;
    fs::remove_all(path_, error);  // of an earlier process with our id
    if (!fs::create_directory(path_, error))
      throw Error(fmt::format("cannot make {}: {}", path_.string(), error.message()));
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const fs::path& path() const { return path_; }

  // What stood there before comes to stand here, and vanishes instead.
  void take_place(const fs::path& target) {
    if (::renameat2(AT_FDCWD, path_.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0)
      return;
    if (errno != ENOENT) {  // a file system that cannot exchange
      const fs::path old = path_.string() + "-old";
      if (::rename(target.c_str(), old.c_str()) != 0 && errno != ENOENT) fail(target);
      if (::rename(path_.c_str(), target.c_str()) != 0) fail(target);
      path_ = old;
    } else if (::rename(path_.c_str(), target.c_str()) != 0) {
      fail(target);
    }
  }

 private:
  [[noreturn]] static void fail(const fs::path& target) {
    throw Error(fmt::format("cannot write {}: {}", target.string(), errno_text(errno)));
  }
  fs::path path_;
};

// What writers that were killed have left.
void remove_left_over(const fs::path& folder) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    const std::size_t at = name.find(kTemporary);
    if (!name.starts_with(kPrefix) || at == std::string::npos) continue;
    std::string_view id = std::string_view(name).substr(at + kTemporary.size());
    const auto pid = number(id.substr(0, id.find('-')));
    if (pid && ::kill(static_cast<pid_t>(*pid), 0) != 0 && errno == ESRCH)
      fs::remove_all(entry.path(), error);
  }
}

// Renamed first: a checkpoint that is half removed is none.
void remove_checkpoint(const fs::path& folder, std::uint64_t step) {
  const fs::path aside = temporary_path(folder, step);
  std::error_code ignored;
  fs::rename(checkpoint_path(folder, step), aside, ignored);
  fs::remove_all(aside, ignored);
}

void remove_old(const fs::path& folder, std::uint64_t written, const CheckpointOptions& options) {
  int kept = 0;
  for (const std::uint64_t step : steps_in(folder)) {
    if (step > written) continue;
    const bool also = std::ranges::find(options.keep_also, step) != options.keep_also.end();
    if (++kept > options.keep && !also) remove_checkpoint(folder, step);
  }
}

// Writes tensors into shards of about options.shard_bytes and says where each lies.
Manifest write_shards(const fs::path& folder, const CheckpointContents& contents,
                      const CheckpointOptions& options) {
  std::vector<TensorView> tensors = contents.tensors;
  std::ranges::sort(tensors, {}, &TensorView::name);
  const auto twice = std::ranges::adjacent_find(tensors, {}, &TensorView::name);
  if (twice != tensors.end())
    throw Error(fmt::format("cannot write {}: the tensor name {} is there twice", folder.string(),
                            shown_name(twice->name)));
  Manifest manifest{.step = contents.step, .state = contents.state, .shards = {}, .tensors = {}};
  for (auto first = tensors.begin(); first != tensors.end();) {
    std::uint64_t data = first->bytes.size();
    auto last = first + 1;
    for (; last != tensors.end() && data + last->bytes.size() <= options.shard_bytes; ++last)
      data += last->bytes.size();
    const std::uint64_t shard = manifest.shards.size();
    const fs::path file = folder / shard_name(shard);
    const std::string sha256 = write_safetensors(file, {first, last});
    const std::uint64_t bytes = fs::file_size(file);
    std::uint64_t offset = bytes - data;  // after the header
    for (; first != last; offset += first->bytes.size(), ++first)
      manifest.tensors.push_back({first->name, first->dtype, first->shape, shard, offset,
                                  first->bytes.size(), sha256_hex(first->bytes)});
    manifest.shards.push_back({shard_name(shard), bytes, sha256});
  }
  return manifest;
}

void check_shard(const fs::path& file, const Manifest::Shard& shard) {
  std::error_code error;
  const std::uint64_t bytes = fs::file_size(file, error);
  if (error) throw ConfigError(fmt::format("{}: {}", file.string(), error.message()), kHint);
  if (bytes != shard.bytes)
    throw ConfigError(
        fmt::format("{}: {} bytes, {} were written", file.string(), bytes, shard.bytes), kHint);
  if (sha256_hex_of_file(file.string()) != shard.sha256)
    throw ConfigError(
        fmt::format("{}: changed since it was written: its checksum differs", file.string()),
        kHint);
}

}  // namespace

fs::path checkpoint_path(const fs::path& folder, std::uint64_t step) {
  return folder / fmt::format("{}{:08}", kPrefix, step);
}

fs::path write_checkpoint(const fs::path& folder, const CheckpointContents& contents,
                          const CheckpointOptions& options) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) throw Error(fmt::format("cannot make {}: {}", folder.string(), error.message()));
  remove_left_over(folder);
  const fs::path target = checkpoint_path(folder, contents.step);
  {
    TemporaryFolder temporary(temporary_path(folder, contents.step));
    try {
      const Manifest manifest = write_shards(temporary.path(), contents, options);
      write_file_atomically(temporary.path() / kManifest, manifest_text(manifest));
    } catch (const std::exception& failure) {
      throw Error(fmt::format("checkpoint of step {} not saved, older ones are whole: {}",
                              contents.step, failure.what()));
    }
    temporary.take_place(target);
    sync_folder(folder);
  }
  if (options.keep > 0) remove_old(folder, contents.step, options);
  return target;
}

Checkpoint Checkpoint::open(const fs::path& path) {
  Checkpoint checkpoint;
  checkpoint.path_ = path;
  std::error_code error;
  if (!fs::is_directory(path, error))
    throw ConfigError(fmt::format("{}: there is no such folder", path.string()),
                      "a checkpoint is a folder step-…");
  const fs::path file = path / kManifest;
  const char* hint = fs::exists(file, error) ? kHint : "a folder without it is no whole checkpoint";
  checkpoint.manifest_ =
      parse_manifest(as_input([&] { return read_text_file(file); }, hint), file.string());
  for (const Manifest::Shard& shard : checkpoint.manifest_.shards)
    as_input([&] { check_shard(path / shard.file, shard); }, kHint);
  return checkpoint;
}

const Manifest::Tensor* Checkpoint::find(std::string_view name) const {
  const auto found = std::ranges::lower_bound(manifest_.tensors, name, {}, &Manifest::Tensor::name);
  return found != manifest_.tensors.end() && found->name == name ? &*found : nullptr;
}

void Checkpoint::read(std::string_view name, std::span<std::byte> out) const {
  const Manifest::Tensor* tensor = find(name);
  if (tensor == nullptr || tensor->bytes != out.size())
    throw ConfigError(
        tensor == nullptr
            ? fmt::format("{}: there is no tensor {}", path_.string(), shown_name(name))
            : fmt::format("{}: tensor {} has {} bytes, {} are wanted", path_.string(),
                          shown_name(name), tensor->bytes, out.size()),
        "the checkpoint of another model?");
  const fs::path file = path_ / manifest_.shards[tensor->shard].file;
  std::ifstream in(file, std::ios::binary);
  in.seekg(static_cast<std::streamoff>(tensor->offset));
  in.read(reinterpret_cast<char*>(out.data()), static_cast<std::streamsize>(out.size()));
  if (!in && !in.eof())
    throw ConfigError(fmt::format("cannot read {}: {}", file.string(), errno_text(errno)), kHint);
  if (sha256_hex(out) != tensor->sha256)
    throw ConfigError(fmt::format("{}: tensor {} is not what was written: its checksum differs",
                                  file.string(), shown_name(name)),
                      kHint);
}

NewestCheckpoint newest_checkpoint(const fs::path& folder) {
  NewestCheckpoint newest;
  for (const std::uint64_t step : steps_in(folder)) {
    try {
      newest.checkpoint = Checkpoint::open(checkpoint_path(folder, step));
      if (newest.checkpoint->step() == step) break;
      newest.skipped.push_back(fmt::format("{}: holds step {}, another folder's",
                                           newest.checkpoint->path().string(),
                                           newest.checkpoint->step()));
      newest.checkpoint.reset();
    } catch (const ConfigError& error) {
      newest.skipped.push_back(error.what());
    }
  }
  return newest;
}

}  // namespace lockstep
