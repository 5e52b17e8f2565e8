// The keys of a job's control channel: two CURVE pairs, one for who serves, one for all clients;
// who has the clients' secret may control the job. Made anew for each job, or known beforehand
// through a key file (`lockstep key FILE`), which alone allows other addresses than loopback.
// Keys and the files that hold them never leave the user: 0600, and refused otherwise.
// Values and free functions; any thread.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace lockstep {

struct CurvePair {
  std::string public_key, secret_key;  // 40 characters of Z85
};
CurvePair make_curve_pair();
// The pair of a secret key; throws ConfigError if it is none.
CurvePair curve_pair_of(const std::string& secret_key);
bool is_curve_key(std::string_view text);  // its form; untrusted text

struct ControlKey {
  CurvePair server, client;
};
ControlKey make_control_key();

// A key file: JSON, {"lockstep_key": 1, "server_secret": …, "client_secret": …}.
std::string format_control_key(const ControlKey& key);
ControlKey parse_control_key(std::string_view text);  // throws ConfigError
// Throws ConfigError: it exists, or its folder does not.
void write_control_key(const std::filesystem::path& path, const ControlKey& key);
// Throws ConfigError: read_private_file's reasons, no key file.
ControlKey read_control_key(const std::filesystem::path& path);

// A file of this user that nobody else may read, of at most 64 KiB. Throws ConfigError when it is
// another's, open to others or too long; Error when it cannot be read.
std::string read_private_file(const std::filesystem::path& path);
// Whole or not at all, mode 0600. Throws Error, also where the file system keeps no modes.
void write_private_file(const std::filesystem::path& path, std::string_view text);

}  // namespace lockstep
