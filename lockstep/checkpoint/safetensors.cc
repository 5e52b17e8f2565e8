#include "lockstep/checkpoint/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/base/hash.h"
#include "lockstep/checkpoint/json.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMostHeaderBytes = 100'000'000;  // the format's own limit
constexpr std::size_t kAlignment = 64;
constexpr std::string_view kMetadata = "__metadata__";

struct Entry {
  TensorView view;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

// One tensor of the header, checked on its own. bad(why) is what it throws.
template <typename Bad>
Entry read_entry(const std::string& name, const json& value, std::uint64_t data_bytes, Bad&& bad) {
  const auto wrong = [&](const std::string& why) {
    return bad(fmt::format("tensor {}: {}", shown_name(name), why));
  };
  const auto part = [&](const char* key) {
    const auto found = value.is_object() ? value.find(key) : value.end();
    return found == value.end() ? json() : *found;
  };
  const json dtype_name = part("dtype"), shape = part("shape"), offsets = part("data_offsets");
  if (!dtype_name.is_string() || !is_list_of_counts(shape) || !is_list_of_counts(offsets) ||
      offsets.size() != 2)
    throw wrong("needs a dtype, a shape and two data_offsets");
  const auto dtype = dtype_from_safetensors_name(dtype_name.get<std::string>());
  if (!dtype) throw wrong("unknown dtype " + shown_name(dtype_name.get<std::string>()));
  const Entry entry{{name, *dtype, shape.get<std::vector<std::int64_t>>(), {}},
                    offsets[0].get<std::uint64_t>(),
                    offsets[1].get<std::uint64_t>()};
  if (entry.begin > entry.end || entry.end > data_bytes)
    throw wrong(fmt::format("its bytes [{}, {}) lie outside the file's {} bytes of data",
                            entry.begin, entry.end, data_bytes));
  const auto expected = byte_count(entry.view.shape, *dtype);
  if (!expected || *expected != entry.end - entry.begin)
    throw wrong(fmt::format("{} bytes do not fit its shape {} of {}", entry.end - entry.begin,
                            shape.dump(), dtype_name.get<std::string>()));
  return entry;
}

}  // namespace

std::optional<std::uint64_t> byte_count(const std::vector<std::int64_t>& shape, Dtype dtype) {
  std::optional<std::uint64_t> count = size_of(dtype);
  for (const std::int64_t extent : shape)
    if (count) count = checked_multiply(*count, static_cast<std::uint64_t>(extent));
  return count;
}

std::string shown_name(std::string_view name) {
  return json(name.substr(0, 80)).dump(-1, ' ', true, json::error_handler_t::replace);
}

std::string write_safetensors(const std::filesystem::path& path, std::vector<TensorView> tensors) {
  std::ranges::sort(tensors, {}, &TensorView::name);
  json header = json::object();                       // sorted by name, as the tensors are
  std::vector<std::span<const std::byte>> pieces(2);  // length and header come last
  std::uint64_t offset = 0;
  for (const TensorView& tensor : tensors) {
    LOCKSTEP_CHECK(byte_count(tensor.shape, tensor.dtype) == tensor.bytes.size(), tensor.name);
    if (tensor.name == kMetadata || header.contains(tensor.name))
      throw Error(fmt::format("cannot write {}: the tensor name {} is {}", path.string(),
                              shown_name(tensor.name),
                              tensor.name == kMetadata ? "reserved" : "there twice"));
    header[tensor.name] = {{"dtype", safetensors_name_of(tensor.dtype)},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
    pieces.push_back(tensor.bytes);
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    throw Error(fmt::format("cannot write {}: a tensor's name is not UTF-8", path.string()));
  }
  std::byte length[8];
  const std::size_t used = sizeof(length) + text.size();
  text.append((kAlignment - used % kAlignment) % kAlignment, ' ');
  write_little_endian<std::uint64_t>(text.size(), length);
  pieces[0] = length;
  pieces[1] = as_byte_span(text);
  write_file_atomically(path, pieces);
  return sha256_hex_of_file(path.string());
}

SafetensorsFile SafetensorsFile::read(const std::filesystem::path& path) {
  return parse(as_input([&] { return read_file(path); }), path.string());
}

SafetensorsFile SafetensorsFile::parse(std::vector<std::byte> bytes, std::string name_for_errors) {
  const auto bad = [&](const std::string& why) {
    return ConfigError(fmt::format("{}: not a whole safetensors file: {}", name_for_errors, why));
  };
  SafetensorsFile file;
  file.bytes_ = std::move(bytes);
  const std::span<const std::byte> all = file.bytes_;
  const auto length = read_little_endian<std::uint64_t>(all, 0);
  if (!length) throw bad(fmt::format("{} bytes are too few", all.size()));
  if (*length > kMostHeaderBytes) throw bad(fmt::format("a header of {} bytes", *length));
  if (!in_bounds(8, *length, all.size()))
    throw bad(fmt::format("its header should have {} bytes, {} follow", *length, all.size() - 8));

  const auto* text = reinterpret_cast<const char*>(all.data()) + 8;
  const json header = json::parse(text, text + *length, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) throw bad("its header is not a JSON object");
  const std::span<const std::byte> data = all.subspan(8 + *length);
  std::vector<Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadata) continue;
    Entry& entry = entries.emplace_back(read_entry(name, value, data.size(), bad));
    entry.view.bytes = data.subspan(entry.begin, entry.end - entry.begin);
  }

  std::ranges::sort(entries, {}, [](const Entry& e) { return std::pair(e.begin, e.end); });
  std::uint64_t covered = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != covered)
      throw bad(fmt::format("tensor {}: {}", shown_name(entry.view.name),
                            entry.begin < covered ? "overlaps another" : "follows a gap"));
    covered = entry.end;
  }
  if (covered != data.size())
    throw bad(fmt::format("{} bytes belong to no tensor", data.size() - covered));
  for (Entry& entry : entries) file.tensors_.push_back(std::move(entry.view));
  std::ranges::sort(file.tensors_, {}, &TensorView::name);
  return file;
}

const TensorView* SafetensorsFile::find(std::string_view name) const {
  const auto found = std::ranges::lower_bound(tensors_, name, {}, &TensorView::name);
  return found != tensors_.end() && found->name == name ? &*found : nullptr;
}

}  // namespace lockstep
