#include "lockstep/transport/interface.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <sys/socket.h>

#include <cerrno>
#include <set>
#include <vector>

#include "lockstep/base/file.h"

namespace lockstep {
namespace {

std::string text_of(const sockaddr* address) {
  char text[NI_MAXHOST] = "";
  const socklen_t length =
      address->sa_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  ::getnameinfo(address, length, text, sizeof text, nullptr, 0, NI_NUMERICHOST);
  return text;
}

// Those that are up; an interface's IPv4 addresses first.
std::vector<Interface> interfaces() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0)
    throw Error("cannot list the network interfaces: " + errno_text(errno));
  std::vector<Interface> all;
  for (const int family : {AF_INET, AF_INET6})
    for (const ifaddrs* entry = list; entry; entry = entry->ifa_next)
      if (entry->ifa_addr && entry->ifa_addr->sa_family == family && (entry->ifa_flags & IFF_UP))
        all.push_back({entry->ifa_name, text_of(entry->ifa_addr)});
  ::freeifaddrs(list);
  return all;
}

// The address that packets to the host leave from.
std::string source_towards(const std::string& host) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  if (const int error = ::getaddrinfo(host.c_str(), "9", &hints, &found); error != 0)
    throw ConfigError(fmt::format("no host '{}': {}", host, ::gai_strerror(error)));
  std::string source;
  int error = 0;
  for (const addrinfo* entry = found; entry && source.empty(); entry = entry->ai_next) {
    const UniqueFd fd(::socket(entry->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    sockaddr_storage own{};
    socklen_t length = sizeof own;
    if (::connect(fd.get(), entry->ai_addr, entry->ai_addrlen) == 0 &&
        ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&own), &length) == 0)
      source = text_of(reinterpret_cast<const sockaddr*>(&own));
    else
      error = errno;
  }
  ::freeaddrinfo(found);
  if (source.empty()) throw ConfigError(fmt::format("no way to '{}': {}", host, errno_text(error)));
  return source;
}

}  // namespace

Interface find_interface(const EndpointOptions& options) {
  std::string wanted = options.interface;
  if (wanted.empty())
    wanted = options.towards.empty() ? "127.0.0.1" : source_towards(options.towards);
  std::set<std::string> names;
  for (const Interface& each : interfaces()) {
    if (each.name == wanted || each.address == wanted) return each;
    names.insert(each.name);
  }
  throw ConfigError(fmt::format("no network interface '{}' that is up", wanted),
                    fmt::format("there are {}", fmt::join(names, ", ")));
}

std::string host_and_port(std::string_view host, int port) {
  return host.find(':') == std::string_view::npos ? fmt::format("{}:{}", host, port)
                                                  : fmt::format("[{}]:{}", host, port);
}

}  // namespace lockstep
