#include <fmt/format.h>
#include <fmt/ranges.h>
#include <zlib.h>

#include <algorithm>
#include <memory>
#include <span>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/data/dataset.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostUnpacked = std::size_t{1} << 32;  // gzip tells sizes modulo this

// One or more gzip members. The buffer grows with what is really there, not with what is promised.
std::vector<std::uint8_t> gunzip(std::span<const std::byte> packed, const std::string& name) {
  const auto damaged = [&](const std::string& why) {
    return ConfigError(fmt::format("{}: damaged gzip file: {}", name, why),
                       "fetch or unpack it again");
  };
  if (packed.size() >= kMostUnpacked) throw damaged("larger than 4 GiB");
  z_stream stream{};
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(packed.data()));
  stream.avail_in = static_cast<uInt>(packed.size());
  LOCKSTEP_CHECK(inflateInit2(&stream, 15 + 16) == Z_OK, "zlib: inflateInit2");
  const std::unique_ptr<z_stream, int (*)(z_stream*)> ended(&stream, inflateEnd);
  std::vector<std::uint8_t> result(std::min(2 * packed.size() + 1, kMostUnpacked));
  std::size_t used = 0;
  for (;;) {
    if (used == result.size()) result.resize(std::min(2 * used, kMostUnpacked));
    if (used == kMostUnpacked) throw damaged("unpacks to more than 4 GiB");
    const auto room = static_cast<uInt>(std::min<std::size_t>(result.size() - used, UINT32_MAX));
    stream.next_out = result.data() + used;
    stream.avail_out = room;
    const int code = inflate(&stream, Z_NO_FLUSH);
    used += room - stream.avail_out;
    if (code == Z_STREAM_END && stream.avail_in == 0) break;
    if (code == Z_STREAM_END)
      inflateReset(&stream);
    else if (code == Z_BUF_ERROR || (code == Z_OK && stream.avail_in == 0 && stream.avail_out))
      throw damaged("it ends too early");
    else if (code != Z_OK)
      throw damaged(stream.msg ? stream.msg : zError(code));
  }
  result.resize(used);
  return result;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  return fmt::format("{}", fmt::join(shape, "×"));
}

// The file itself, or the same with ".gz" where only that exists; "" when neither does.
fs::path existing(const fs::path& path) {
  for (const fs::path& candidate : {path, fs::path(path.string() + ".gz")}) {
    std::error_code error;
    if (fs::exists(candidate, error)) return candidate;
    if (error)
      throw ConfigError(fmt::format("cannot read {}: {}", candidate.string(), error.message()));
  }
  return {};
}

void check_folder(const fs::path& folder) {
  std::error_code error;
  const bool is_folder = fs::is_directory(folder, error);
  if (is_folder) return;
  throw ConfigError(fmt::format("cannot read the data folder {}: {}", folder.string(),
                                error ? error.message() : "not a folder"),
                    "Debian's package dataset-fashion-mnist installs "
                    "/usr/share/datasets/fashion-mnist");
}

IdxArray read_idx_or_hint(const fs::path& path, const std::string& hint_when_missing) {
  const fs::path found = existing(path);
  if (found.empty())
    throw ConfigError(fmt::format("cannot read {}: there is neither this file nor {}.gz",
                                  path.string(), path.filename().string()),
                      hint_when_missing);
  const auto content = as_input([&] { return read_file(found); });
  const auto* first = reinterpret_cast<const std::uint8_t*>(content.data());
  const bool packed = content.size() >= 2 && first[0] == 0x1f && first[1] == 0x8b;
  return parse_idx(packed ? gunzip(content, found.string())
                          : std::vector<std::uint8_t>(first, first + content.size()),
                   found.string());
}

// Images and, unless labels_path is empty, their labels.
Dataset load_pair(const fs::path& images_path, const fs::path& labels_path,
                  std::int64_t class_count, const std::string& hint_when_missing = "") {
  IdxArray images = read_idx_or_hint(images_path, hint_when_missing);
  if (images.shape.size() < 2)
    throw ConfigError(fmt::format("{}: holds labels, not images (shape {})", images_path.string(),
                                  shape_text(images.shape)));
  Dataset data;
  data.source = images_path.string();
  data.rows = static_cast<std::uint64_t>(images.shape[0]);
  data.sample_shape.assign(images.shape.begin() + 1, images.shape.end());
  data.bytes = std::move(images.bytes);
  data.class_count = class_count;
  if (labels_path.empty()) return data;

  const IdxArray labels = read_idx_or_hint(labels_path, hint_when_missing);
  if (labels.shape.size() != 1)
    throw ConfigError(fmt::format("{}: holds no labels (shape {})", labels_path.string(),
                                  shape_text(labels.shape)));
  if (labels.bytes.size() != data.rows)
    throw ConfigError(fmt::format("{} holds {} images, but {} holds {} labels",
                                  images_path.string(), data.rows, labels_path.string(),
                                  labels.bytes.size()));
  for (std::size_t row = 0; row < labels.bytes.size(); ++row)
    if (labels.bytes[row] >= class_count)
      throw ConfigError(fmt::format("{}: row {}: label {} is not one of the classes 0 to {}",
                                    labels_path.string(), row, labels.bytes[row], class_count - 1));
  data.classes.assign(labels.bytes.begin(), labels.bytes.end());
  return data;
}

}  // namespace

IdxArray parse_idx(std::vector<std::uint8_t> content, const std::string& name) {
  constexpr std::size_t kMostDimensions = 8;
  const std::span<const std::byte> bytes = std::as_bytes(std::span(content));
  const auto magic = read_big_endian<std::uint32_t>(bytes, 0);
  if (!magic)
    throw ConfigError(fmt::format("{}: {} bytes are too few for an IDX file", name, bytes.size()));
  const std::size_t dimensions = *magic & 0xff;
  if (*magic >> 8 != 0x08 || dimensions == 0 || dimensions > kMostDimensions)
    throw ConfigError(
        fmt::format("{}: not an IDX file of unsigned bytes: its magic is 0x{:08x}", name, *magic),
        "images have 0x00000803, labels 0x00000801");
  IdxArray result;
  std::optional<std::uint64_t> expected = 1;
  for (std::size_t i = 0; i < dimensions; ++i) {
    const auto extent = read_big_endian<std::uint32_t>(bytes, 4 + 4 * i);
    if (!extent) throw ConfigError(fmt::format("{}: truncated within its header", name));
    if (*extent == 0)
      throw ConfigError(fmt::format("{}: holds nothing (dimension {} is 0)", name, i));
    result.shape.push_back(*extent);
    if (expected) expected = checked_multiply(*expected, *extent);
  }
  const std::size_t header = 4 + 4 * dimensions;
  const std::size_t found = bytes.size() - header;
  if (!expected || found < *expected)
    throw ConfigError(fmt::format("{}: truncated: its header says {}, {} bytes follow", name,
                                  shape_text(result.shape), found));
  if (found > *expected)
    throw ConfigError(fmt::format("{}: {} bytes too many after its {} elements", name,
                                  found - *expected, shape_text(result.shape)));
  content.erase(content.begin(), content.begin() + static_cast<std::ptrdiff_t>(header));
  result.bytes = std::move(content);
  return result;
}

IdxArray read_idx(const fs::path& path) { return read_idx_or_hint(path, ""); }

Dataset load_idx_training(const fs::path& folder, std::int64_t class_count) {
  check_folder(folder);
  Dataset result = load_pair(folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte",
                             class_count);
  result.source = folder.string();
  return result;
}

TrainTest load_idx_folder(const fs::path& folder, std::int64_t class_count) {
  TrainTest result{
      .train = load_idx_training(folder, class_count),
      .test = load_pair(folder / "t10k-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte",
                        class_count, "split.test = 0.2 holds out some of the training images")};
  if (result.train.sample_shape != result.test.sample_shape)
    throw ConfigError(fmt::format("{}: training images are {}, test images {}", folder.string(),
                                  shape_text(result.train.sample_shape),
                                  shape_text(result.test.sample_shape)));
  result.test.source = folder.string();
  return result;
}

Dataset load_idx_images(const fs::path& folder_or_file) {
  std::error_code ignored;
  if (!fs::is_directory(folder_or_file, ignored)) return load_pair(folder_or_file, {}, 0);
  const fs::path labels = folder_or_file / "t10k-labels-idx1-ubyte";
  const bool labelled = !existing(labels).empty();
  Dataset data = load_pair(folder_or_file / "t10k-images-idx3-ubyte", labelled ? labels : "", 256);
  const auto largest = std::max_element(data.classes.begin(), data.classes.end());
  data.class_count = labelled ? *largest + 1 : 0;
  return data;
}

}  // namespace lockstep
