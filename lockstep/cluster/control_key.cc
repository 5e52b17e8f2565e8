#include "lockstep/cluster/control_key.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include <array>
#include <cerrno>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/cluster/control_message.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kKeyCharacters = 40;
constexpr off_t kMaxFileBytes = 64 << 10;
constexpr mode_t kOthers = 077;
constexpr std::string_view kZ85 =
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";

using KeyText = std::array<char, kKeyCharacters + 1>;

}  // namespace

bool is_curve_key(std::string_view text) {
  return text.size() == kKeyCharacters && text.find_first_not_of(kZ85) == std::string_view::npos;
}

CurvePair make_curve_pair() {
  KeyText public_key{}, secret_key{};
  if (::zmq_curve_keypair(public_key.data(), secret_key.data()) != 0)
    throw Error(fmt::format("no key for the control channel: {}; libzmq needs CURVE (libsodium)",
                            ::zmq_strerror(errno)));
  return {public_key.data(), secret_key.data()};
}

CurvePair curve_pair_of(const std::string& secret_key) {
  KeyText public_key{};  // libzmq decodes as much as it is given: the form is checked before
  if (!is_curve_key(secret_key) || ::zmq_curve_public(public_key.data(), secret_key.c_str()) != 0)
    throw ConfigError("a secret key is 40 characters of Z85");
  return {public_key.data(), secret_key};
}

ControlKey make_control_key() { return {make_curve_pair(), make_curve_pair()}; }

std::string format_control_key(const ControlKey& key) {
  return nlohmann::json{{"lockstep_key", 1},
                        {"server_secret", key.server.secret_key},
                        {"client_secret", key.client.secret_key}}
             .dump(1) +
         "\n";
}

ControlKey parse_control_key(std::string_view text) {
  const nlohmann::json json = parse_flat_json(text, "lockstep_key");
  return {curve_pair_of(text_in(json, "server_secret")),
          curve_pair_of(text_in(json, "client_secret"))};
}

void write_control_key(const fs::path& path, const ControlKey& key) {
  std::error_code error;
  if (fs::symlink_status(path, error).type() != fs::file_type::not_found)
    throw ConfigError(fmt::format("{} exists", path.string()),
                      "a key is not replaced: name another file, or remove this one");
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (!fs::is_directory(folder, error))
    throw ConfigError(fmt::format("there is no folder {}", folder.string()));
  write_private_file(path, format_control_key(key));
}

ControlKey read_control_key(const fs::path& path) {
  try {
    return parse_control_key(read_private_file(path));
  } catch (const ConfigError& error) {
    throw ConfigError(fmt::format("key file {}: {}", path.string(), error.what()));
  } catch (const Error& error) {
    throw ConfigError(error.what(), "lockstep key FILE makes one");
  }
}

std::string read_private_file(const fs::path& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  struct stat status {};
  if (!fd || ::fstat(fd.get(), &status) != 0)
    throw Error(fmt::format("cannot read {}: {}", path.string(), errno_text(errno)));
  if (!S_ISREG(status.st_mode)) throw ConfigError("it is no regular file");
  if (status.st_uid != ::geteuid())
    throw ConfigError(fmt::format("it belongs to another user (uid {})", status.st_uid));
  if ((status.st_mode & kOthers) != 0)
    throw ConfigError(
        fmt::format("others than its owner may use it (mode {:04o})", status.st_mode & 07777),
        "its secret may be known: make a new one, and chmod 600");
  if (status.st_size > kMaxFileBytes) throw ConfigError("it is too long");
  return read_text_file(fmt::format("/proc/self/fd/{}", fd.get()));  // what was looked at
}

void write_private_file(const fs::path& path, std::string_view text) {
  write_file_atomically(path, text, 0600);
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0 && (status.st_mode & kOthers) == 0) return;
  ::unlink(path.c_str());
  throw Error(
      fmt::format("cannot keep {} to its owner: its file system has no modes", path.string()));
}

}  // namespace lockstep
