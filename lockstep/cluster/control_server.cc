#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "lockstep/base/error.h"
#include "lockstep/base/numbers.h"
#include "lockstep/cluster/control.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/cluster/control_socket.h"

namespace lockstep {
namespace {

constexpr int kLingerMs = 500;
constexpr int kBacklog = 16;
constexpr const char* kAuthentication = "inproc://zeromq.zap.01";  // ZeroMQ's name (RFC 27)
constexpr const char* kDomain = "lockstep";

sockaddr_in resolve(const std::string& address) {
  const std::size_t colon = address.find(':');
  const std::string name = address.substr(0, colon);
  const std::string port = colon == std::string::npos ? "0" : address.substr(colon + 1);
  const auto number = whole_number(port, 0, 65535);
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_INET;
  if (name.empty() || !number || ::getaddrinfo(name.c_str(), nullptr, &hints, &found) != 0)
    throw ConfigError(fmt::format("control address {} is none", address),
                      "an IPv4 address or name of this machine, ADDR or ADDR:PORT");
  sockaddr_in result{};
  std::memcpy(&result, found->ai_addr, sizeof result);
  ::freeaddrinfo(found);
  result.sin_port = htons(static_cast<std::uint16_t>(*number));
  return result;
}

// Our own, not ZeroMQ's, so that what was checked is what is bound, and the port stays ours.
UniqueFd listen_on(const std::string& asked, bool has_key, std::string& endpoint) {
  sockaddr_in address = resolve(asked);
  if (ntohl(address.sin_addr.s_addr) >> 24 != IN_LOOPBACKNET && !has_key)
    throw ConfigError(
        fmt::format("control address {} can be reached from other machines, and there is no key",
                    asked),
        "lockstep key FILE makes one; give it with --key-file FILE");
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int yes = 1;
  socklen_t length = sizeof address;
  auto* const any = reinterpret_cast<sockaddr*>(&address);
  if (!fd || ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) != 0 ||
      ::bind(fd.get(), any, length) != 0 || ::listen(fd.get(), kBacklog) != 0 ||
      ::getsockname(fd.get(), any, &length) != 0)
    throw ConfigError(fmt::format("control address {}: {}", asked, errno_text(errno)),
                      "another port, or an address of this machine");
  const bool everywhere = address.sin_addr.s_addr == htonl(INADDR_ANY);
  std::array<char, INET_ADDRSTRLEN> text{};
  ::inet_ntop(AF_INET, &address.sin_addr, text.data(), text.size());
  endpoint =
      fmt::format("tcp://{}:{}", everywhere ? "127.0.0.1" : text.data(), ntohs(address.sin_port));
  return fd;
}

std::string decoded(const std::string& key) {
  std::string bytes(32, '\0');
  LOCKSTEP_CHECK(is_curve_key(key) &&
                 ::zmq_z85_decode(reinterpret_cast<std::uint8_t*>(bytes.data()), key.c_str()));
  return bytes;
}

std::string reply_to(const std::string& text, const ControlPeer& peer,
                     const ControlServer::Answer& answer) {
  ControlReply reply;
  try {
    const ControlRequest request = parse_request(text);
    reply.id = request.id;
    reply.result = answer(request, peer);
  } catch (const std::exception& error) {
    reply.error = *error.what() != '\0' ? error.what() : "unknown error";
    reply.bad_input = dynamic_cast<const ConfigError*>(&error) != nullptr;
  }
  std::string encoded = encode(reply);
  if (encoded.size() <= kMaxControlBytes) return encoded;
  reply.error = "the answer is too long";
  return encode(reply);
}

}  // namespace

struct ControlServer::State {
  explicit State(const ControlServerOptions& options);
  void listen();
  bool reserve();
  void admit();
  void limit_connections();

  ControlKey key;
  int most_connections;
  std::string client_key;  // 32 bytes
  std::string endpoint;
  UniqueFd listener, next;  // one socket; what ZeroMQ listens with the next time
  MonitoredSocket channel;  // a ROUTER: its messages begin with who they are from or for
  zmq::socket_t authentication;
  std::string bound;          // ZeroMQ's name of where it listens
  std::set<int> connections;  // their descriptors
  std::vector<int> ended;     // and of those that nobody has been told of
};

ControlServer::State::State(const ControlServerOptions& options)
    : key(options.key ? *options.key : make_control_key()),
      most_connections(options.most_connections),
      client_key(decoded(key.client.public_key)),
      listener(listen_on(options.address, options.key.has_value(), endpoint)),
      channel(zmq::socket_type::router, ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_DISCONNECTED, kLingerMs),
      authentication(channel.context, zmq::socket_type::rep) {
  authentication.set(zmq::sockopt::linger, 0);
  // Before anybody can connect: where nothing is bound, ZeroMQ lets everybody in who knows the
  // server's public key.
  authentication.bind(kAuthentication);
  channel.watch(authentication);
  channel.socket.set(zmq::sockopt::curve_server, 1);
  channel.socket.set(zmq::sockopt::curve_secretkey, key.server.secret_key);
  channel.socket.set(zmq::sockopt::zap_domain, kDomain);
  if (!reserve()) throw Error("no control channel: " + errno_text(errno));
  listen();
}

void ControlServer::State::listen() {
  channel.socket.set(zmq::sockopt::use_fd, next.release());  // ZeroMQ's from here
  channel.socket.bind(endpoint);
  bound = channel.socket.get(zmq::sockopt::last_endpoint);
  reserve();
}

// Where connections have taken all descriptors there would be none to go on with.
bool ControlServer::State::reserve() {
  if (!next) next = UniqueFd(::fcntl(listener.get(), F_DUPFD_CLOEXEC, 3));
  return static_cast<bool>(next);
}

// Who has not shown the key holds a descriptor of ours for as long as a handshake may take. To
// stop listening ends all connections that came that way.
void ControlServer::State::limit_connections() {
  for (const auto& [kind, number] : channel.events()) {
    if (kind == ZMQ_EVENT_ACCEPTED)
      connections.insert(number);
    else if (connections.erase(number) > 0)
      ended.push_back(number);
  }
  if (static_cast<int>(connections.size()) <= most_connections || !reserve()) return;
  channel.socket.unbind(bound);
  ended.insert(ended.end(), connections.begin(), connections.end());
  connections.clear();
  listen();
}

// ZeroMQ asks about each client whose handshake is right so far (ZAP, RFC 27): version, id, domain,
// address, routing id, mechanism, public key. Without an answer it does not let it in.
void ControlServer::State::admit() {
  while (readable(authentication)) {
    const std::vector<std::string> ask = receive(authentication);
    if (ask.empty()) return;
    const bool ours = ask.size() == 7 && ask[0] == "1.0" && ask[2] == kDomain &&
                      ask[5] == "CURVE" && ask[6] == client_key;
    send(authentication, {"1.0", ask.size() > 1 ? ask[1] : "", ours ? "200" : "400",
                          ours ? "OK" : "another key", "", ""});
  }
}

ControlServer::ControlServer(const ControlServerOptions& options) {
  try {
    state_ = std::make_unique<State>(options);
  } catch (const zmq::error_t& error) {
    throw Error(fmt::format("no control channel at {}: {}", options.address, error.what()));
  }
}
ControlServer::~ControlServer() = default;

const ControlKey& ControlServer::key() const { return state_->key; }
const std::string& ControlServer::endpoint() const { return state_->endpoint; }
int ControlServer::fd() const { return state_->channel.fd(); }

void ControlServer::handle(const Answer& answer) {
  try {
    state_->limit_connections();
    state_->admit();
    zmq::socket_t& socket = state_->channel.socket;
    while (readable(socket)) {
      int connection = -1;
      const std::vector<std::string> message = receive(socket, &connection);
      if (message.size() == 2)
        send(socket, {message[0], reply_to(message[1], {message[0], connection}, answer)});
    }
  } catch (const zmq::error_t& error) {
    throw Error(fmt::format("control channel {}: {}", state_->endpoint, error.what()));
  }
}

void ControlServer::push(const ControlPeer& peer, std::uint64_t request,
                         const nlohmann::json& result) {
  const std::string text = encode(ControlReply{.id = request, .result = result, .error = {}});
  if (text.size() <= kMaxControlBytes) send(state_->channel.socket, {peer.route, text});
}

std::vector<int> ControlServer::ended_connections() { return std::exchange(state_->ended, {}); }

}  // namespace lockstep
