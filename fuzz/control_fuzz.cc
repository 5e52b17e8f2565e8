// What comes over the control channel, also between nodes, and the two files that lead to it. What
// was read and is written again must be read the same.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>

#include "fuzz/target.h"
#include "lockstep/cluster/control_file.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/cluster/job_nodes.h"
#include "lockstep/cluster/membership_wire.h"

namespace {

using namespace lockstep;

template <typename Action>
void expect_error(Action action) {
  try {
    action();
  } catch (const Error& error) {
    LOCKSTEP_CHECK(dynamic_cast<const ConfigError*>(&error) == nullptr, error.what());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  expect_error([&] {
    const ControlRequest request = parse_request(text);
    const ControlRequest again = parse_request(encode(request));
    LOCKSTEP_CHECK(again.id == request.id && again.action == request.action);
    LOCKSTEP_CHECK(again.arguments == request.arguments);
  });
  expect_error([&] {
    const ControlReply reply = parse_reply(text);
    const ControlReply again = parse_reply(encode(reply));
    LOCKSTEP_CHECK(again.id == reply.id && again.error == reply.error);
    LOCKSTEP_CHECK(again.bad_input == reply.bad_input && again.result == reply.result);
  });
  fuzz::expect_config_error([&] {
    const ControlEntry entry = parse_control_entry(text);
    LOCKSTEP_CHECK(parse_control_entry(format_control_entry(entry)).pid == entry.pid);
  });
  fuzz::expect_config_error([&] {
    const ControlKey key = parse_control_key(text);
    LOCKSTEP_CHECK(parse_control_key(format_control_key(key)).client.public_key ==
                   key.client.public_key);
  });
  const nlohmann::json object = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return 0;
  const auto same_again = [&](auto read) {
    fuzz::expect_config_error([&] {
      const auto written = to_json(read(object));
      LOCKSTEP_CHECK(to_json(read(written)) == written);
    });
  };
  same_again(node_report_from);
  same_again(assignment_from);
  same_again(introduction_from);
  same_again(welcome_from);
  return 0;
}
