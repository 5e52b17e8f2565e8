// Messages of the control channel: one frame of JSON each, {"lockstep": VERSION, "id": N, …}. Who
// reads one trusts nothing in it, though its sender has the job's key. Pure functions; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace lockstep {

inline constexpr std::uint64_t kControlVersion = 1;
inline constexpr std::size_t kMaxControlBytes = std::size_t{4} << 20;
inline constexpr int kMaxControlDepth = 16;

// Delivered at least once: what an action does twice must be what it does once.
struct ControlRequest {
  std::uint64_t id = 0;  // the client's; the reply bears it
  std::string action;
  nlohmann::json arguments = nlohmann::json::object();
};

struct ControlReply {
  std::uint64_t id = 0;  // 0: to a request that could not be read
  nlohmann::json result = nlohmann::json::object();
  std::string error;       // not empty: the request failed, there is no result
  bool bad_input = false;  // it was refused as wrong: a ConfigError there, and here
};

std::string encode(const ControlRequest& request);
std::string encode(const ControlReply& reply);
// Both throw Error: too long, nested too deeply, no JSON, another version, a member missing or of a
// wrong type.
ControlRequest parse_request(std::string_view text);
ControlReply parse_reply(std::string_view text);

// For files, too: an object whose member `version` is 1. These three throw ConfigError.
nlohmann::json parse_flat_json(std::string_view text, const char* version);
std::string text_in(const nlohmann::json& object, const char* member);
std::uint64_t whole_in(const nlohmann::json& object, const char* member);

}  // namespace lockstep
