// UCX: TCP or RDMA, whichever it finds at the interface. A generation has a worker (UCX's word for
// an end of connections) of its own, so that nothing of an older one can reach it and its end is
// complete; Links carry the workers' addresses and tell of a peer's end, which UCX sees late.
#include <fmt/format.h>
#include <signal.h>
#include <ucp/api/ucp.h>
#include <ucs/debug/debug.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "lockstep/transport/engines.h"
#include "lockstep/transport/interface.h"
#include "lockstep/transport/linked_transport.h"
#include "lockstep/transport/tickets.h"
#include "lockstep/transport/ucx_worker.h"

namespace lockstep {
namespace {

using ucx::check;
using ucx::Context;
using ucx::Worker;

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

class UcxTransport final : public LinkedTransport {
 public:
  UcxTransport(Context& context, LinkListener& listener, const std::vector<LinkAddress>& addresses,
               int rank, std::uint64_t generation)
      : LinkedTransport(addresses, rank), peers_(addresses.size()) {
    worker_.emplace(context);
    links_.emplace(listener, "ucx", addresses, rank, generation, worker_->address());
    for (int peer = 0; peer < size(); ++peer) peers_[peer].self = {this, peer};
  }
  ~UcxTransport() override {
    if (!aborted_) leave();
    abort();
  }

  std::string_view name() const override { return "ucx"; }
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
    bool agreed = false;
    std::vector<Ticket> deferred;        // sends until then
    std::pair<UcxTransport*, int> self;  // for UCX's callback
  };

  std::uint64_t tag_of(int sender, std::uint16_t channel) const {
    return std::uint64_t{channel} << 32 | static_cast<std::uint32_t>(sender);
  }
  void start(Operation& send);
  void look(Operation& operation);
  void greeted(int peer, const std::string& text) override;
  void progress() override;
  bool is_busy(int peer) override;
  void connect(int peer);
  void agree(int peer);

  std::optional<Worker> worker_;  // none after abort()
  std::vector<Peer> peers_;
  Tickets<Operation> tickets_;
  bool moved_ = false;  // something has, since wait() last looked
  int agreed_ = 0;      // peers
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
  Operation operation{.peer = to,
                      .tag = tag_of(rank(), channel),
                      .is_send = true,
                      .deferred = true,
                      .bytes = bytes};
  if (peer.agreed && alive(to)) start(operation);
  const bool deferred = operation.deferred;
  ++partners_[to].sent;
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
  if (!operation.is_send) ++partners_[operation.peer].received;
}

bool UcxTransport::done(Ticket ticket) {
  check_open();
  Operation& operation = tickets_.at(ticket);
  progress();
  look(operation);
  const std::string& error = partners_[operation.peer].error;
  if (operation.status == UCS_INPROGRESS) {
    if (error.empty()) return false;
    fail(operation.peer, error);
  }
  const std::size_t expected = operation.bytes.size();
  if (operation.status == UCS_ERR_MESSAGE_TRUNCATED)
    fail(operation.peer, fmt::format("sent more than the {} bytes that were expected", expected));
  if (operation.status != UCS_OK)
    fail(operation.peer, error.empty() ? ucs_status_string(operation.status) : error);
  if (!operation.is_send && operation.received != expected)
    fail(operation.peer,
         fmt::format("sent {} bytes where {} were expected", operation.received, expected));
  tickets_.remove(ticket);
  return true;
}

void UcxTransport::progress() {
  for (int i = 0; i < kMostProgress && ucp_worker_progress(worker_->get()) != 0; ++i) moved_ = true;
  for (int rank = 0; rank < size() && agreed_ + 1 < size(); ++rank) agree(rank);
  look_now_and_then();
}

bool UcxTransport::is_busy(int peer) {
  bool busy = false;
  tickets_.for_each(
      [&](const Operation& operation) { busy |= operation.is_send && operation.peer == peer; });
  return busy;
}

// Of two ranks the higher one connects, and the lower one when something has come over that
// connection. Sends wait until something has come back. So it is known with whom UCX still
// negotiates: it must not be asked to end that (abort()).
void UcxTransport::greeted(int rank, const std::string&) {
  Peer& peer = peers_[rank];
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  peer.hello_received = ucp_tag_recv_nbx(worker_->get(), nullptr, 0, kHello | rank,
                                         std::numeric_limits<ucp_tag_t>::max(), &parameters);
  if (UCS_PTR_IS_ERR(peer.hello_received))
    check(UCS_PTR_STATUS(std::exchange(peer.hello_received, nullptr)), "receiving");
  if (rank < this->rank()) connect(rank);
}

void UcxTransport::agree(int rank) {
  Peer& peer = peers_[rank];
  if (!peer.hello_received || ucp_request_check_status(peer.hello_received) == UCS_INPROGRESS)
    return;
  ucp_request_free(std::exchange(peer.hello_received, nullptr));
  if (rank > this->rank()) connect(rank);
  peer.agreed = true;
  ++agreed_;
  if (alive(rank))
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
    std::string& error = transport->partners_[number].error;
    if (error.empty()) error = ucs_status_string(status);
  };
  const ucs_status_t status = ucp_ep_create(worker_->get(), &parameters, &peer.connection);
  if (status != UCS_OK) {
    peer.connection = nullptr;
    partners_[rank].error = ucs_status_string(status);
    return;
  }
  ucp_request_param_t hello{};
  peer.hello_sent = ucp_tag_send_nbx(peer.connection, nullptr, 0, kHello | this->rank(), &hello);
  if (!UCS_PTR_IS_PTR(peer.hello_sent)) peer.hello_sent = nullptr;
}

void UcxTransport::wait(Clock::duration at_most) {
  check_open();
  // Of what moved, somebody may have asked for another operation.
  if (std::exchange(moved_, false) || ucp_worker_arm(worker_->get()) != UCS_OK) return;
  sleep(worker_->fd(), at_most);
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
  for (int rank = 0; rank < size(); ++rank) {
    Peer& peer = peers_[rank];
    if (!peer.agreed) {
      negotiates |= partners_[rank].greeted;
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
