// The network interface that an engine is bound to. Values and free functions; any thread.
#pragma once

#include <string>
#include <string_view>

#include "lockstep/transport/transport.h"

namespace lockstep {

struct Interface {
  std::string name;     // "eth0"
  std::string address;  // its first, or the one asked for: "10.0.0.2"
};
// As EndpointOptions names it. Throws ConfigError where there is none such.
Interface find_interface(const EndpointOptions& options);

// "10.0.0.2:4711", "[fe80::1]:4711".
std::string host_and_port(std::string_view host, int port);

}  // namespace lockstep
