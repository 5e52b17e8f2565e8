#include "lockstep/tools/node_flags.h"

#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "lockstep/base/bytes.h"
#include "lockstep/base/hash.h"
#include "lockstep/base/instruction_sets.h"
#include "lockstep/base/numbers.h"
#include "lockstep/tools/commands.h"
#include "lockstep/transport/transport.h"

namespace lockstep {
namespace {

constexpr int kPort = 29400, kSlurmPorts = 1000;  // torchrun's
constexpr int kMostNodes = 4096;

int number_in(const std::string& text, int least, int most, const char* what) {
  if (const auto value = whole_number(text, least, most)) return *value;
  throw ConfigError(fmt::format("{} {} is not a number from {} to {}", what, text, least, most));
}

// The first of "node[01-04,07],other".
std::string first_host(const std::string& list) {
  const std::size_t bracket = list.find('[');
  std::string host = list.substr(0, list.find_first_of(",["));
  if (bracket != std::string::npos && bracket == host.size())
    host += list.substr(bracket + 1, list.find_first_of(",-]", bracket) - bracket - 1);
  return host;
}

// Every task of the step is a node.
NodeFlags with_slurms(NodeFlags flags, const Environment& environment) {
  const auto text = [&](const char* name) {
    const auto found = environment.find(name);
    return found == environment.end() ? std::string() : found->second;
  };
  const std::string tasks = text("SLURM_STEP_NUM_TASKS");
  if (!flags.nodes.empty() || tasks.empty() || text("SLURM_STEP_ID").empty() || tasks == "1" ||
      environment.contains("LOCKSTEP_LAUNCHER"))
    return flags;
  flags.nodes = tasks;
  if (flags.rank < 0)
    flags.rank = number_in(text("SLURM_PROCID"), 0, kMostNodes - 1, "SLURM_PROCID");
  const int job = number_in(text("SLURM_JOB_ID"), 0, 1 << 30, "SLURM_JOB_ID");
  if (flags.endpoint.empty())
    flags.endpoint =
        fmt::format("{}:{}", first_host(text("SLURM_STEP_NODELIST")), kPort + job % kSlurmPorts);
  if (flags.id.empty()) flags.id = fmt::format("slurm-{}.{}", job, text("SLURM_STEP_ID"));
  return flags;
}

// Where node 0 listens: at the address, but everywhere where that is only this machine's own view
// of its name (Debian's /etc/hosts has 127.0.1.1).
std::string listening_address(const std::string& host, int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_INET;
  if (::getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0)
    throw ConfigError(fmt::format("--rdzv-endpoint {}: there is no such host", host),
                      "a name or address of node 0 that all nodes know");
  sockaddr_in address{};
  std::memcpy(&address, found->ai_addr, sizeof address);
  ::freeaddrinfo(found);
  const bool loopback = ntohl(address.sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
  const bool meant = host == "localhost" || host.starts_with("127.");
  return fmt::format("{}:{}", loopback && !meant ? "0.0.0.0" : host, port);
}

std::string line_of_standard_input() {
  std::string line;
  for (char c = 0; line.size() < 4096 && ::read(STDIN_FILENO, &c, 1) == 1 && c != '\n';) line += c;
  return line;
}

const char* instruction_set() {
  return has_avx512() ? "AVX-512" : has_avx2() ? "AVX2" : "baseline";
}

}  // namespace

void add_node_flags(CLI::App& app, NodeFlags& flags) {
  const auto add = [&](const char* name, auto& value, const char* meaning) {
    return app.add_option(both_spellings(name), value, meaning);
  };
  add("--nnodes", flags.nodes, "nodes, or MIN:MAX: begins and goes on with MIN; default 1");
  add("--node-rank", flags.rank, "this node's number, from 0");
  add("--rdzv-endpoint", flags.endpoint, "HOST:PORT of node 0, where the others join");
  add("--backend", flags.backend, "between nodes: ucx, zmq; default: the first that is there");
  add("--interface", flags.interface,
      "between nodes: an interface or its address; default: the one that leads to node 0");
  add("--hostfile", flags.hostfile, "hosts, one a line: starts this command on each, over ssh");
  add("--ssh", flags.ssh, "--hostfile: the command to reach them")->capture_default_str();
  add("--rdzv-id", flags.id, "the job's name, the same on all nodes");
  add("--node-timeout", flags.timeout_s, "seconds of silence until a node is lost")
      ->check(CLI::Range(0.3, 3600.0))
      ->capture_default_str();
}

int free_port() {
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (!fd || ::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0)
    throw Error("no free port for MASTER_PORT: " + errno_text(errno));
  return ntohs(address.sin_port);
}

std::optional<NodePlace> node_place(const NodeFlags& given, ControlFlags& control,
                                    const Environment& environment) {
  const NodeFlags flags = with_slurms(given, environment);
  const auto [least, most] = split_range(flags.nodes.empty() ? "1" : flags.nodes);
  NodePlace place;
  place.options.most = number_in(most, 1, kMostNodes, "--nnodes");
  place.options.least =
      least.empty() ? place.options.most : number_in(least, 1, place.options.most, "--nnodes");
  if (place.options.most == 1) {
    if (flags.rank > 0)
      throw ConfigError(fmt::format("--node-rank {}: this job has one node", flags.rank),
                        "--nnodes says how many");
    return std::nullopt;
  }
  const auto missing = [&](const char* flag, const char* hint) {
    return ConfigError(fmt::format("--nnodes {} needs {}", flags.nodes, flag), hint);
  };
  if (flags.rank < 0) throw missing("--node-rank", "this node's number, from 0");
  if (flags.rank >= place.options.most)
    throw ConfigError(fmt::format("--node-rank {}: --nnodes {} has 0 to {}", flags.rank,
                                  flags.nodes, place.options.most - 1));
  if (flags.endpoint.empty()) throw missing("--rdzv-endpoint", "HOST:PORT of node 0");
  if (control.key_file.empty())
    throw missing("--key-file", "lockstep key FILE makes one: copy it to every node");
  const std::size_t colon = flags.endpoint.rfind(':');
  place.host = flags.endpoint.substr(0, colon);
  const int port = colon == std::string::npos ? kPort
                                              : number_in(flags.endpoint.substr(colon + 1), 1,
                                                          65535, "--rdzv-endpoint: port");
  place.options.rank = flags.rank;
  place.options.timeout =
      std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(flags.timeout_s));
  place.options.same = {
      {"lockstep", LOCKSTEP_VERSION}, {"instruction set", instruction_set()},
      {"--nnodes", flags.nodes},      {"--rdzv-id", flags.id},
      {"--backend", flags.backend},   {"--node-timeout", fmt::format("{:g}", flags.timeout_s)}};
  const bool given_here = control.key_file == "-";
  const ControlKey key =
      given_here ? parse_control_key(line_of_standard_input()) : read_control_key(control.key_file);
  control.key = key;
  if (given_here) place.options.bound_to = STDIN_FILENO;
  // Told to the workers, who prove it to each other: nobody can control the job with it.
  place.environment["LOCKSTEP_KEY"] =
      sha256_hex(as_byte_span("lockstep transport\n" + key.server.secret_key));
  if (!flags.backend.empty())
    place.environment["LOCKSTEP_BACKEND"] = name_of(engine_from(flags.backend));
  if (!flags.interface.empty()) place.environment["LOCKSTEP_INTERFACE"] = flags.interface;
  if (flags.rank == 0) {
    if (control.address == ControlFlags().address)
      control.address = listening_address(place.host, port);
  } else {
    place.options.coordinator = {fmt::format("tcp://{}:{}", place.host, port),
                                 key.server.public_key, key.client};
  }
  return place;
}

}  // namespace lockstep
