// UCX: TCP or RDMA, whichever it finds at the interface. A generation has a worker (UCX's word for
// an end of connections) of its own, so that nothing of an older one can reach it and its end is
// complete; Links carry the workers' addresses and tell of a peer's end, which UCX sees late.
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <ucp/api/ucp.h>
#include <ucs/debug/debug.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "lockstep/transport/engines.h"
#include "lockstep/transport/interface.h"
#include "lockstep/transport/links.h"
#include "lockstep/transport/tickets.h"
#include "lockstep/transport/ucx_worker.h"

namespace lockstep {
namespace {

using ucx::check;
using ucx::Context;
using ucx::Worker;

constexpr auto kLooks = std::chrono::milliseconds(5);  // at the links, of who never waits
constexpr auto kLinger = std::chrono::milliseconds(500);
constexpr auto kCloseTime = std::chrono::seconds(5);
constexpr int kMostProgress = 64;
constexpr std::uint64_t kHello = std::uint64_t{1} << 48;  // a tag that no channel has

// UCX takes the signals of crashes when it is loaded, which are not its own: whoever prints a
// backtrace, waits for a debugger or goes on is decided elsewhere.
[[maybe_unused]] const bool kSignalsAreOurs = [] {
  for (const int signal : {SIGILL, SIGSEGV, SIGBUS, SIGFPE}) ucs_debug_disable_signal(signal);
  return true;
}();

struct Operation {
  int peer = 0;
  std::uint64_t tag = 0;
  bool is_send = false;
  bool deferred = false;  // a send that waits for the peer
  std::span<const std::byte> bytes;
  ucs_status_ptr_t request = nullptr;  // UCX's, while under way
  ucs_status_t status = UCS_INPROGRESS;
  std::size_t received = 0;
};

class UcxTransport final : public Transport {
 public:
  UcxTransport(Context& context, LinkListener& listener, const std::vector<LinkAddress>& addresses,
               int rank, std::uint64_t generation)
      : rank_(rank), addresses_(addresses), peers_(addresses.size()) {
    worker_.emplace(context);
    links_.emplace(listener, "ucx", addresses, rank, generation, worker_->address());
    for (int peer = 0; peer < size(); ++peer) peers_[peer].self = {this, peer};
  }
  ~UcxTransport() override {
    if (!aborted_) leave();
    abort();
  }

  std::string_view name() const override { return "ucx"; }
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(peers_.size()); }
  std::string describe(int peer) const override {
    const LinkAddress& address = addresses_.at(peer);
    return fmt::format("rank {} ({})", peer, host_and_port(address.host, address.port));
  }

  Ticket send(int to, std::uint16_t channel, std::span<const std::byte> bytes) override;
  Ticket receive(int from, std::uint16_t channel, std::span<std::byte> bytes) override;
  bool done(Ticket ticket) override;
  void wait(Clock::duration at_most) override;
  void abort() noexcept override;

 private:
  struct Peer {
    ucp_ep_h connection = nullptr;
    // The first messages each way: once they are over, UCX has agreed on the connection.
    ucs_status_ptr_t hello_sent = nullptr, hello_received = nullptr;
    bool greeted = false, agreed = false;
    std::vector<Ticket> deferred;          // sends until then
    std::uint64_t sent = 0, received = 0;  // messages
    std::string error;                     // why it is over with him
    std::pair<UcxTransport*, int> self;    // for UCX's callback
  };

  void check_open() const {
    if (aborted_) throw TransportError(-1, "ucx: the transport was aborted");
  }
  void check_open(int peer) const {
    check_open();
    LOCKSTEP_CHECK(peer >= 0 && peer < size() && peer != rank_, "not another rank");
  }
  std::uint64_t tag_of(int sender, std::uint16_t channel) const {
    return std::uint64_t{channel} << 32 | static_cast<std::uint32_t>(sender);
  }
  void start(Operation& send);
  void look(Operation& operation);
  void progress();
  void progress_links();
  void greet(int peer);
  void connect(int peer);
  void agree(int peer);
  void leave() noexcept;
  bool alive(int peer) const { return peer != rank_ && peers_[peer].error.empty(); }
  std::string name_of(int peer, std::string_view why) const {
    return fmt::format("ucx: {}: {}", describe(peer), why);
  }

  std::optional<Worker> worker_;  // neither after abort()
  std::optional<Links> links_;
  const int rank_;
  const std::vector<LinkAddress> addresses_;
  std::vector<Peer> peers_;
  Tickets<Operation> tickets_;
  Clock::time_point looked_{};
  bool moved_ = false;  // something has, since wait() last looked
  int agreed_ = 0;      // peers
  bool aborted_ = false;
};

void UcxTransport::start(Operation& send) {
  ucp_request_param_t parameters{};
  const ucs_status_ptr_t request = ucp_tag_send_nbx(peers_[send.peer].connection, send.bytes.data(),
                                                    send.bytes.size(), send.tag, &parameters);
  if (UCS_PTR_IS_PTR(request))
    send.request = request;
  else
    send.status = UCS_PTR_STATUS(request);
  send.deferred = false;
}

Transport::Ticket UcxTransport::send(int to, std::uint16_t channel,
                                     std::span<const std::byte> bytes) {
  check_open(to);
  Peer& peer = peers_[to];
  Operation operation{
      .peer = to, .tag = tag_of(rank_, channel), .is_send = true, .deferred = true, .bytes = bytes};
  if (peer.agreed && peer.error.empty()) start(operation);
  const bool deferred = operation.deferred;
  ++peer.sent;
  const Ticket ticket = tickets_.add(std::move(operation));
  if (deferred) peer.deferred.push_back(ticket);
  return ticket;
}

Transport::Ticket UcxTransport::receive(int from, std::uint16_t channel,
                                        std::span<std::byte> bytes) {
  check_open(from);
  Operation operation{.peer = from, .tag = tag_of(from, channel), .bytes = bytes};
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  const ucs_status_ptr_t request =
      ucp_tag_recv_nbx(worker_->get(), bytes.data(), bytes.size(), operation.tag,
                       std::numeric_limits<ucp_tag_t>::max(), &parameters);
  if (UCS_PTR_IS_ERR(request)) check(UCS_PTR_STATUS(request), "receiving");
  operation.request = request;
  return tickets_.add(std::move(operation));
}

// Takes in what UCX says of an operation under way.
void UcxTransport::look(Operation& operation) {
  if (!operation.request) return;
  ucp_tag_recv_info_t info{};
  operation.status = operation.is_send ? ucp_request_check_status(operation.request)
                                       : ucp_tag_recv_request_test(operation.request, &info);
  if (operation.status == UCS_INPROGRESS) return;
  operation.received = info.length;
  ucp_request_free(std::exchange(operation.request, nullptr));
  if (!operation.is_send) ++peers_[operation.peer].received;
}

bool UcxTransport::done(Ticket ticket) {
  check_open();
  Operation& operation = tickets_.at(ticket);
  progress();
  look(operation);
  const Peer& peer = peers_[operation.peer];
  const auto fail = [&](const std::string& why) {
    throw TransportError(operation.peer, name_of(operation.peer, why));
  };
  if (operation.status == UCS_INPROGRESS) {
    if (peer.error.empty()) return false;
    fail(peer.error);
  }
  const std::size_t expected = operation.bytes.size();
  if (operation.status == UCS_ERR_MESSAGE_TRUNCATED)
    fail(fmt::format("sent more than the {} bytes that were expected", expected));
  if (operation.status != UCS_OK)
    fail(peer.error.empty() ? ucs_status_string(operation.status) : peer.error);
  if (!operation.is_send && operation.received != expected)
    fail(fmt::format("sent {} bytes where {} were expected", operation.received, expected));
  tickets_.remove(ticket);
  return true;
}

void UcxTransport::progress() {
  for (int i = 0; i < kMostProgress && ucp_worker_progress(worker_->get()) != 0; ++i) moved_ = true;
  for (int rank = 0; rank < size() && agreed_ + 1 < size(); ++rank) agree(rank);
  if (!links_->complete() || Clock::now() - looked_ > kLooks) progress_links();
}

void UcxTransport::progress_links() {
  looked_ = Clock::now();
  links_->progress();
  for (int rank = 0; rank < size(); ++rank) {
    if (!alive(rank)) continue;
    Peer& peer = peers_[rank];
    const Links::Peer& link = links_->peer(rank);
    if (link.text && !peer.greeted) greet(rank);
    // Who has left in order may have sent what has not come yet.
    if (!link.lost.empty() && (!link.farewell || peer.received >= *link.farewell))
      peer.error = link.farewell ? "has left" : link.lost;
  }
}

// Of two ranks the higher one connects, and the lower one when something has come over that
// connection. Sends wait until something has come back. So it is known with whom UCX still
// negotiates: it must not be asked to end that (abort()).
void UcxTransport::greet(int rank) {
  Peer& peer = peers_[rank];
  peer.greeted = true;
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  peer.hello_received = ucp_tag_recv_nbx(worker_->get(), nullptr, 0, kHello | rank,
                                         std::numeric_limits<ucp_tag_t>::max(), &parameters);
  if (UCS_PTR_IS_ERR(peer.hello_received))
    check(UCS_PTR_STATUS(std::exchange(peer.hello_received, nullptr)), "receiving");
  if (rank < rank_) connect(rank);
}

void UcxTransport::agree(int rank) {
  Peer& peer = peers_[rank];
  if (!peer.hello_received || ucp_request_check_status(peer.hello_received) == UCS_INPROGRESS)
    return;
  ucp_request_free(std::exchange(peer.hello_received, nullptr));
  if (rank > rank_) connect(rank);
  peer.agreed = true;
  ++agreed_;
  if (peer.error.empty())
    for (const Ticket ticket : std::exchange(peer.deferred, {})) start(tickets_.at(ticket));
}

void UcxTransport::connect(int rank) {
  Peer& peer = peers_[rank];
  ucp_ep_params_t parameters{};
  parameters.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLER |
                          UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  parameters.address = reinterpret_cast<const ucp_address_t*>(links_->peer(rank).text->data());
  parameters.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  parameters.err_handler.arg = &peer.self;
  parameters.err_handler.cb = [](void* argument, ucp_ep_h, ucs_status_t status) {
    const auto& [transport, number] = *static_cast<std::pair<UcxTransport*, int>*>(argument);
    std::string& error = transport->peers_[number].error;
    if (error.empty()) error = ucs_status_string(status);
  };
  const ucs_status_t status = ucp_ep_create(worker_->get(), &parameters, &peer.connection);
  if (status != UCS_OK) {
    peer.connection = nullptr;
    peer.error = ucs_status_string(status);
    return;
  }
  ucp_request_param_t hello{};
  peer.hello_sent = ucp_tag_send_nbx(peer.connection, nullptr, 0, kHello | rank_, &hello);
  if (!UCS_PTR_IS_PTR(peer.hello_sent)) peer.hello_sent = nullptr;
}

void UcxTransport::wait(Clock::duration at_most) {
  check_open();
  // Of what moved, somebody may have asked for another operation.
  if (std::exchange(moved_, false) || ucp_worker_arm(worker_->get()) != UCS_OK) return;
  pollfd fds[] = {{worker_->fd(), POLLIN, 0}, {links_->fd(), POLLIN, 0}};
  const auto ns = std::chrono::nanoseconds(std::max(at_most, Clock::duration::zero())).count();
  const timespec timeout{ns / 1'000'000'000, ns % 1'000'000'000};
  if (::ppoll(fds, std::size(fds), &timeout, nullptr) > 0 && fds[1].revents) progress_links();
}

// The peers are told how many messages there were, and what UCX still has of them goes out until
// they leave, too.
void UcxTransport::leave() noexcept try {
  const Deadline deadline = Deadline::after(kLinger);
  std::vector<bool> busy(peers_.size());
  tickets_.for_each([&](const Operation& operation) {
    if (operation.is_send) busy[operation.peer] = true;
  });
  const auto in_order = [&](int peer) { return alive(peer) && !busy[peer]; };
  for (int peer = 0; peer < size(); ++peer)
    if (in_order(peer)) links_->say_farewell(peer, peers_[peer].sent);
  const auto somebody_stays = [&] {
    for (int peer = 0; peer < size(); ++peer)
      if (in_order(peer) && peers_[peer].greeted && !links_->peer(peer).farewell) return true;
    return false;
  };
  while (somebody_stays() && !deadline.expired()) {
    wait(std::chrono::milliseconds(10));
    progress();
  }
} catch (const std::exception&) {  // then the connection's end tells them
}

// With a peer whom UCX still negotiates with, nothing of ours is under way, and what UCX (1.13)
// owes him it can't drop: its assertion ends the process. Then the worker stays, for good, unused.
void UcxTransport::abort() noexcept {
  if (std::exchange(aborted_, true)) return;
  std::vector<ucs_status_ptr_t> waited, requests;
  const auto end = [&](ucs_status_ptr_t& request, bool is_send) {
    if (!request) return;
    if (!is_send) ucp_request_cancel(worker_->get(), request);
    (is_send ? waited : requests).push_back(std::exchange(request, nullptr));
  };
  tickets_.for_each([&](Operation& operation) { end(operation.request, operation.is_send); });
  bool negotiates = false;
  for (Peer& peer : peers_) {
    if (!peer.agreed) {
      negotiates |= peer.greeted;
      continue;
    }
    end(peer.hello_sent, true);
    if (!peer.connection) continue;
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    parameters.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t request = ucp_ep_close_nbx(peer.connection, &parameters);
    if (UCS_PTR_IS_PTR(request)) waited.push_back(request);
  }
  const Deadline deadline = Deadline::after(kCloseTime);
  // A receive of which a part has come is not over then; with its connection and its worker gone
  // nobody goes on with it.
  for (const ucs_status_ptr_t request : waited)
    while (ucp_request_check_status(request) == UCS_INPROGRESS && !deadline.expired())
      ucp_worker_progress(worker_->get());
  std::ranges::copy(waited, std::back_inserter(requests));
  std::ranges::for_each(requests, ucp_request_free);
  if (negotiates) worker_->leak();
  worker_.reset();
  links_.reset();
}

class UcxEndpoint final : public Endpoint {
 public:
  explicit UcxEndpoint(const Interface& interface) : context_(interface), listener_(interface) {}

  std::string_view name() const override { return "ucx"; }
  std::string address() const override { return listener_.address().text("ucx"); }
  std::unique_ptr<Transport> connect(const std::vector<std::string>& addresses, int rank,
                                     const ConnectOptions& options) override {
    return std::make_unique<UcxTransport>(context_, listener_,
                                          link_addresses("ucx", addresses, rank, listener_), rank,
                                          options.generation);
  }

 private:
  Context context_;
  LinkListener listener_;
};

}  // namespace

std::string ucx_unavailable() { return ""; }
std::unique_ptr<Endpoint> make_ucx_endpoint(const EndpointOptions& options) {
  return std::make_unique<UcxEndpoint>(find_interface(options));
}

}  // namespace lockstep
