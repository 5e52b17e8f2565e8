#include "lockstep/cluster/control_message.h"

#include <fmt/format.h>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

using nlohmann::json;

json parse_object(std::string_view text, int most_depth) {
  if (text.size() > kMaxControlBytes)
    throw ConfigError(
        fmt::format("{} bytes, at most {} are allowed", text.size(), kMaxControlBytes));
  const auto limit = [most_depth](int depth, json::parse_event_t, json&) {
    if (depth > most_depth) throw ConfigError("it is nested too deeply");
    return true;
  };
  json object = json::parse(text, limit, /*allow_exceptions=*/false);
  if (!object.is_object()) throw ConfigError("it is no JSON object");
  return object;
}

void check_version(const json& object, const char* member, std::uint64_t version) {
  if (const std::uint64_t found = whole_in(object, member); found != version)
    throw ConfigError(fmt::format("its version is {}, this program's {}", found, version));
}

// A request's and a reply's errors are one kind: whoever sent it is no user of ours.
template <typename Read>
auto read_message(std::string_view text, Read read) {
  try {
    const json message = parse_object(text, kMaxControlDepth);
    check_version(message, "lockstep", kControlVersion);
    return read(message);
  } catch (const ConfigError& error) {
    throw Error(fmt::format("a control message cannot be read: {}", error.what()));
  }
}

// A worker's or a user's text may hold any bytes: never a reason to fail.
std::string dump(const json& message) {
  return message.dump(-1, ' ', false, json::error_handler_t::replace);
}

json object_in(const json& message, const char* member) {
  const auto found = message.find(member);
  if (found == message.end() || !found->is_object())
    throw ConfigError(fmt::format("it has no object '{}'", member));
  return *found;
}

}  // namespace

json parse_flat_json(std::string_view text, const char* version) {
  json object = parse_object(text, 1);
  check_version(object, version, 1);
  return object;
}

std::string text_in(const json& object, const char* member) {
  const auto found = object.find(member);
  if (found == object.end() || !found->is_string())
    throw ConfigError(fmt::format("it has no text '{}'", member));
  return found->get<std::string>();
}

std::uint64_t whole_in(const json& object, const char* member) {
  const auto found = object.find(member);
  if (found == object.end() || !found->is_number_integer() ||
      (!found->is_number_unsigned() && found->get<std::int64_t>() < 0))
    throw ConfigError(fmt::format("it has no whole number '{}'", member));
  return found->get<std::uint64_t>();
}

std::string encode(const ControlRequest& request) {
  return dump({{"lockstep", kControlVersion},
               {"id", request.id},
               {"action", request.action},
               {"arguments", request.arguments}});
}

std::string encode(const ControlReply& reply) {
  json message{{"lockstep", kControlVersion}, {"id", reply.id}};
  if (reply.error.empty()) {
    message["result"] = reply.result;
  } else {
    message["error"] = reply.error;
    message["bad_input"] = reply.bad_input;
  }
  return dump(message);
}

ControlRequest parse_request(std::string_view text) {
  return read_message(text, [](const json& message) {
    return ControlRequest{whole_in(message, "id"), text_in(message, "action"),
                          object_in(message, "arguments")};
  });
}

ControlReply parse_reply(std::string_view text) {
  return read_message(text, [](const json& message) {
    ControlReply reply;
    reply.id = whole_in(message, "id");
    if (message.contains("error")) {
      reply.error = text_in(message, "error");
      if (reply.error.empty()) throw ConfigError("its 'error' is empty");
      reply.bad_input = message.value("bad_input", json()) == true;
    } else {
      reply.result = object_in(message, "result");
    }
    return reply;
  });
}

}  // namespace lockstep
