#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/data/dataset.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostBytes = std::size_t{1} << 30;

std::vector<fs::path> files_in(const fs::path& place) {
  std::error_code error;
  if (!fs::is_directory(place, error)) return {place};
  std::vector<fs::path> files;
  fs::recursive_directory_iterator entries(place, fs::directory_options::skip_permission_denied,
                                           error);
  for (; !error && entries != fs::end(entries); entries.increment(error)) {
    std::error_code ignored;  // a link that leads nowhere is no file
    if (entries->is_regular_file(ignored)) files.push_back(entries->path());
  }
  if (error) throw ConfigError(fmt::format("{}: {}", place.string(), error.message()));
  std::ranges::sort(files);
  return files;
}

}  // namespace

Dataset load_text(const std::vector<fs::path>& places, std::int64_t block) {
  LOCKSTEP_CHECK(!places.empty() && block > 1);
  Dataset data;
  data.source = places[0].string();
  data.sample_shape = {block};
  std::string text;
  for (const fs::path& place : places) {
    for (const fs::path& file : files_in(place)) {
      text += as_input([&] { return read_text_file(file); },
                       "a file of text, or a folder of such files");
      if (text.size() > kMostBytes)
        throw ConfigError(fmt::format("{}: more than {} bytes of text", data.source, kMostBytes),
                          "a smaller folder");
    }
  }
  const auto size = static_cast<std::size_t>(block), stride = size - 1;
  if (text.size() < size)
    throw ConfigError(
        fmt::format("{}: {} bytes are less than a block of {}", data.source, text.size(), block),
        "more text, or a smaller model.context");
  data.rows = (text.size() - 1) / stride;
  data.bytes.reserve(data.rows * size);
  for (std::size_t row = 0; row < data.rows; ++row) {
    const auto first = text.begin() + static_cast<std::ptrdiff_t>(row * stride);
    data.bytes.insert(data.bytes.end(), first, first + block);
  }
  return data;
}

}  // namespace lockstep
