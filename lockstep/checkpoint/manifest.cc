#include "lockstep/checkpoint/manifest.h"

#include <fmt/format.h>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/base/hash.h"
#include "lockstep/checkpoint/json.h"
#include "lockstep/checkpoint/safetensors.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr std::string_view kFormat = "lockstep checkpoint";
constexpr std::uint64_t kVersion = 1;
constexpr int kDeepest = 64;  // levels of brackets: a deep enough text would exhaust the stack

// What is wrong, without the file's name.
struct Fault {
  std::string text;
  std::string hint = "another checkpoint, or train from the start";
};

bool too_deep(std::string_view text) {
  int depth = 0;
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted && c == '\\')
      ++i;
    else if (c == '"')
      quoted = !quoted;
    else if (!quoted && (c == '{' || c == '['))
      if (++depth > kDeepest) return true;
    if (!quoted && (c == '}' || c == ']')) --depth;
  }
  return false;
}

const json& member(const json& object, const char* key, const std::string& of = "") {
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (found == object.end()) throw Fault{fmt::format("{}\"{}\" is missing", of, key)};
  return *found;
}

std::uint64_t count(const json& object, const char* key, const std::string& of = "") {
  const json& value = member(object, key, of);
  if (!is_count(value)) throw Fault{fmt::format("{}\"{}\" is no count", of, key)};
  return value.get<std::uint64_t>();
}

const std::string& text(const json& object, const char* key, const std::string& of = "") {
  const json& value = member(object, key, of);
  if (!value.is_string()) throw Fault{fmt::format("{}\"{}\" is no text", of, key)};
  return value.get_ref<const std::string&>();
}

const std::string& sha256(const json& object, const std::string& of = "") {
  const std::string& value = text(object, "sha256", of);
  if (value.size() != 64 || value.find_first_not_of("0123456789abcdef") != std::string::npos)
    throw Fault{of + "\"sha256\" is none"};
  return value;
}

const json& list(const json& object, const char* key) {
  const json& value = member(object, key);
  if (!value.is_array()) throw Fault{fmt::format("\"{}\" is no list", key)};
  return value;
}

Manifest::Tensor read_tensor(const json& value, const std::vector<Manifest::Shard>& shards) {
  Manifest::Tensor tensor;
  tensor.name = text(value, "name", "a tensor's ");
  const std::string of = fmt::format("tensor {}: ", shown_name(tensor.name));
  const std::string& dtype_name = text(value, "dtype", of);
  const auto dtype = dtype_from_safetensors_name(dtype_name);
  if (!dtype) throw Fault{of + "unknown dtype " + shown_name(dtype_name)};
  tensor.dtype = *dtype;
  const json& shape = member(value, "shape", of);
  if (!is_list_of_counts(shape)) throw Fault{of + "\"shape\" is no list of extents"};
  tensor.shape = shape.get<std::vector<std::int64_t>>();
  tensor.shard = count(value, "shard", of);
  tensor.offset = count(value, "offset", of);
  tensor.sha256 = sha256(value, of);
  if (tensor.shard >= shards.size())
    throw Fault{fmt::format("{}there is no shard {}", of, tensor.shard)};
  const auto bytes = byte_count(tensor.shape, tensor.dtype);
  if (!bytes || !in_bounds(tensor.offset, *bytes, shards[tensor.shard].bytes))
    throw Fault{of + "its bytes lie outside its shard"};
  tensor.bytes = *bytes;
  return tensor;
}

Manifest read_manifest(json all) {
  const auto format = all.is_object() ? all.find("format") : all.end();
  if (format == all.end() || *format != kFormat)
    throw Fault{"not a manifest of lockstep's", "the folder of a checkpoint, step-…"};
  const std::uint64_t version = count(all, "version");
  if (version != kVersion)
    throw Fault{
        fmt::format("version {} of the format; this program reads version {}", version, kVersion),
        "the lockstep that wrote it"};
  Manifest manifest;
  manifest.step = count(all, "step");
  if (!member(all, "state").is_object()) throw Fault{"\"state\" is no object"};
  manifest.state = all["state"].dump();
  for (const json& value : list(all, "shards")) {
    const std::string of = fmt::format("shard {}: ", manifest.shards.size());
    if (text(value, "file", of) != shard_name(manifest.shards.size()))
      throw Fault{of + "an unexpected file name"};
    manifest.shards.push_back(
        {shard_name(manifest.shards.size()), count(value, "bytes", of), sha256(value, of)});
  }
  for (const json& value : list(all, "tensors")) {
    manifest.tensors.push_back(read_tensor(value, manifest.shards));
    const auto size = manifest.tensors.size();
    if (size > 1 && manifest.tensors[size - 2].name >= manifest.tensors[size - 1].name)
      throw Fault{"tensors out of order, or one twice"};
  }
  const std::string expected = sha256(all);
  all.erase("sha256");
  if (sha256_hex(as_byte_span(all.dump())) != expected)
    throw Fault{"changed since it was written: its checksum differs"};
  return manifest;
}

}  // namespace

std::string shard_name(std::uint64_t shard) {
  return fmt::format("shard-{:05}.safetensors", shard);
}

std::string manifest_text(const Manifest& manifest) {
  json all = {{"format", kFormat}, {"version", kVersion}, {"step", manifest.step}};
  all["state"] = json::parse(manifest.state, nullptr, /*allow_exceptions=*/false);
  if (!all["state"].is_object() || too_deep(manifest.state))
    throw Error("a checkpoint's state must be a JSON object");
  all["shards"] = json::array();
  for (const auto& shard : manifest.shards)
    all["shards"].push_back(
        {{"file", shard.file}, {"bytes", shard.bytes}, {"sha256", shard.sha256}});
  all["tensors"] = json::array();
  for (const auto& tensor : manifest.tensors)
    all["tensors"].push_back({{"name", tensor.name},
                              {"dtype", safetensors_name_of(tensor.dtype)},
                              {"shape", tensor.shape},
                              {"shard", tensor.shard},
                              {"offset", tensor.offset},
                              {"sha256", tensor.sha256}});
  try {
    all["sha256"] = sha256_hex(as_byte_span(all.dump()));
    return all.dump(1) + "\n";
  } catch (const nlohmann::json::exception&) {
    throw Error("a tensor's name is not UTF-8");
  }
}

Manifest parse_manifest(std::string_view text, const std::string& name_for_errors) {
  try {
    if (too_deep(text)) throw Fault{"not a manifest: nested too deeply"};
    json all = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (all.is_discarded()) throw Fault{"not JSON: cut short, or another program's"};
    return read_manifest(std::move(all));
  } catch (const Fault& fault) {
    throw ConfigError(fmt::format("{}: {}", name_for_errors, fault.text), fault.hint);
  }
}

}  // namespace lockstep
