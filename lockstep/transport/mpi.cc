// MPI, for clusters where mpirun or srun starts programs: among the ranks of MPI_COMM_WORLD alone,
// which MPI can't replace when they end. A generation is a part of the tag.
#define OMPI_SKIP_MPICXX 1  // the C++ interface that MPI has given up
#define MPICH_SKIP_MPICXX 1
#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <utility>

#include "lockstep/transport/engines.h"
#include "lockstep/transport/tickets.h"

namespace lockstep {
namespace {

constexpr std::string_view kPrefix = "mpi:";
constexpr std::size_t kPieceBytes = std::size_t{1} << 30;  // MPI counts with int
constexpr auto kNap = std::chrono::microseconds(20), kLongNap = std::chrono::microseconds(500);

std::string text_of(int error) {
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(error, text, &length);
  return text;
}
void check(int error, std::string_view what) {
  if (error != MPI_SUCCESS)
    throw TransportError(-1, fmt::format("mpi: {}: {}", what, text_of(error)));
}

// MPI may be begun once in a process. Whoever began it ends it.
void begin_mpi() {
  int begun = 0, ended = 0;
  MPI_Initialized(&begun);
  MPI_Finalized(&ended);
  if (ended) throw ConfigError("mpi: MPI has ended in this process, and cannot begin again");
  if (!begun) {
    int provided = 0;
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
    std::atexit([] {
      int finalized = 0;
      MPI_Finalized(&finalized);
      if (!finalized) MPI_Finalize();
    });
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
}
int world(int (*ask)(MPI_Comm, int*)) {
  int value = 0;
  check(ask(MPI_COMM_WORLD, &value), "asking who is there");
  return value;
}

struct Operation {
  int peer = 0, tag = 0;
  bool is_send = false;
  std::span<std::byte> bytes = {};
  // MPI's until it is done, which abort() can't hasten: so it gets none of the caller's memory.
  std::unique_ptr<std::byte[]> copy = {};
  std::size_t begun = 0;                   // bytes
  bool matched = false;                    // all of it has begun
  std::vector<MPI_Request> requests = {};  // a piece each
};

class MpiTransport final : public ReducingTransport {
 public:
  MpiTransport(std::vector<int> ranks, int rank, std::uint64_t generation)
      : ranks_(std::move(ranks)), rank_(rank), generation_(generation) {}
  ~MpiTransport() override { abort(); }

  std::string_view name() const override { return "mpi"; }
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(ranks_.size()); }
  std::string describe(int peer) const override {
    return fmt::format("rank {} ({}{})", peer, kPrefix, ranks_.at(peer));
  }
  Ticket send(int to, std::uint16_t channel, std::span<const std::byte> bytes) override;
  Ticket receive(int from, std::uint16_t channel, std::span<std::byte> bytes) override;
  Ticket all_reduce(const std::vector<int>& members, std::span<std::byte> data, Dtype dtype,
                    Combining combining) override;
  bool done(Ticket ticket) override;
  void wait(Clock::duration at_most) override;
  void abort() noexcept override;

 private:
  void check_open() const {
    if (aborted_) throw TransportError(-1, "mpi: the transport was aborted");
  }
  [[noreturn]] void fail(int peer, std::string_view why) const {
    if (peer < 0) throw TransportError(peer, fmt::format("mpi: {}", why));
    throw TransportError(peer, fmt::format("mpi: {}: {}", describe(peer), why));
  }
  Operation begin(int peer, std::uint16_t channel, std::span<std::byte> bytes) const;
  void match(std::deque<Ticket>& receives);
  bool match(Operation& receive);
  MPI_Comm communicator(const std::vector<int>& members);

  const std::vector<int> ranks_;  // MPI's
  const int rank_;
  const std::uint64_t generation_;
  Tickets<Operation> tickets_;
  std::map<std::pair<int, int>, std::deque<Ticket>> unmatched_;  // receives, by peer and tag
  std::map<std::vector<int>, MPI_Comm> communicators_;           // MPI_Finalize ends them
  Clock::duration nap_ = kNap;
  bool aborted_ = false;
};

Operation MpiTransport::begin(int peer, std::uint16_t channel, std::span<std::byte> bytes) const {
  check_open();
  LOCKSTEP_CHECK(peer >= 0 && peer < size() && peer != rank_, "not another rank");
  Operation operation{.peer = peer, .bytes = bytes};
  operation.tag = static_cast<int>((generation_ & 0x7fff) << 16 | channel);
  operation.copy = std::make_unique_for_overwrite<std::byte[]>(bytes.size());
  return operation;
}

Transport::Ticket MpiTransport::send(int to, std::uint16_t channel,
                                     std::span<const std::byte> bytes) {
  Operation send = begin(to, channel, {const_cast<std::byte*>(bytes.data()), bytes.size()});
  send.is_send = send.matched = true;
  std::ranges::copy(bytes, send.copy.get());
  do {
    const std::size_t piece = std::min(kPieceBytes, bytes.size() - send.begun);
    const int error =
        MPI_Isend(send.copy.get() + send.begun, static_cast<int>(piece), MPI_BYTE, ranks_[to],
                  send.tag, MPI_COMM_WORLD, &send.requests.emplace_back(MPI_REQUEST_NULL));
    if (error != MPI_SUCCESS) fail(to, text_of(error));
    send.begun += piece;
  } while (send.begun < bytes.size());
  return tickets_.add(std::move(send));
}

Transport::Ticket MpiTransport::receive(int from, std::uint16_t channel,
                                        std::span<std::byte> bytes) {
  Operation receive = begin(from, channel, bytes);
  std::deque<Ticket>& receives = unmatched_[{from, receive.tag}];
  const Ticket ticket = tickets_.add(std::move(receive));
  receives.push_back(ticket);
  match(receives);
  return ticket;
}

// Those that have come, in order.
void MpiTransport::match(std::deque<Ticket>& receives) {
  while (!receives.empty() && match(tickets_.at(receives.front()))) {
    tickets_.at(receives.front()).matched = true;
    receives.pop_front();
  }
}

// Receives what has come of the message; true once it is whole. It is looked at before it is
// received: where it is longer than the memory for it, Open MPI (4.1) may crash.
bool MpiTransport::match(Operation& receive) {
  for (;;) {
    const std::size_t expected = std::min(kPieceBytes, receive.bytes.size() - receive.begun);
    int here = 0, count = 0;
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    const int error =
        MPI_Improbe(ranks_[receive.peer], receive.tag, MPI_COMM_WORLD, &here, &message, &status);
    if (error != MPI_SUCCESS) fail(receive.peer, text_of(error));
    if (!here) return false;
    MPI_Get_count(&status, MPI_BYTE, &count);
    if (static_cast<std::size_t>(count) != expected)
      receive.copy = std::make_unique_for_overwrite<std::byte[]>(receive.begun + count);
    MPI_Imrecv(receive.copy.get() + receive.begun, count, MPI_BYTE, &message,
               &receive.requests.emplace_back(MPI_REQUEST_NULL));
    receive.begun += static_cast<std::size_t>(count);
    if (static_cast<std::size_t>(count) != expected || receive.begun == receive.bytes.size())
      return true;
  }
}

// MPI has none that waits with a deadline for who does not come: so all are on the way here.
MPI_Comm MpiTransport::communicator(const std::vector<int>& members) {
  const auto [found, is_new] = communicators_.try_emplace(members, MPI_COMM_NULL);
  if (!is_new) return found->second;
  std::vector<int> numbers;
  for (const int member : members) numbers.push_back(ranks_.at(member));
  MPI_Group everybody = MPI_GROUP_NULL, chosen = MPI_GROUP_NULL;
  check(MPI_Comm_group(MPI_COMM_WORLD, &everybody), "choosing ranks");
  check(MPI_Group_incl(everybody, static_cast<int>(numbers.size()), numbers.data(), &chosen),
        "choosing ranks");
  check(MPI_Comm_create_group(MPI_COMM_WORLD, chosen, 0, &found->second), "a group of ranks");
  MPI_Group_free(&chosen);
  MPI_Group_free(&everybody);
  check(MPI_Comm_set_errhandler(found->second, MPI_ERRORS_RETURN), "a group of ranks");
  return found->second;
}

MPI_Datatype type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return MPI_FLOAT;
    case Dtype::float64:
      return MPI_DOUBLE;
    case Dtype::int32:
      return MPI_INT32_T;
    case Dtype::int64:
      return MPI_INT64_T;
    default:
      break;
  }
  LOCKSTEP_CHECK(false, "MPI knows no such type");
  return MPI_DATATYPE_NULL;
}

Transport::Ticket MpiTransport::all_reduce(const std::vector<int>& members,
                                           std::span<std::byte> data, Dtype dtype,
                                           Combining combining) {
  check_open();
  const MPI_Op kOperations[] = {MPI_SUM, MPI_MIN, MPI_MAX, MPI_PROD};
  Operation all{.peer = -1, .bytes = data, .matched = true};
  all.copy = std::make_unique_for_overwrite<std::byte[]>(data.size());
  std::ranges::copy(data, all.copy.get());
  for (; all.begun < data.size(); all.begun += std::min(kPieceBytes, data.size() - all.begun)) {
    const std::size_t piece = std::min(kPieceBytes, data.size() - all.begun);
    check(MPI_Iallreduce(MPI_IN_PLACE, all.copy.get() + all.begun,
                         static_cast<int>(piece / size_of(dtype)), type_of(dtype),
                         kOperations[static_cast<int>(combining)], communicator(members),
                         &all.requests.emplace_back(MPI_REQUEST_NULL)),
          "all_reduce");
  }
  return tickets_.add(std::move(all));
}

bool MpiTransport::done(Ticket ticket) {
  check_open();
  Operation& operation = tickets_.at(ticket);
  for (auto& [key, receives] : unmatched_) match(receives);  // others wait for them
  bool over = operation.matched;
  for (MPI_Request& request : operation.requests) {
    int done = 1;
    if (const int error = MPI_Test(&request, &done, MPI_STATUS_IGNORE); error != MPI_SUCCESS)
      fail(operation.peer, text_of(error));
    over &= done != 0;
  }
  if (!over) return false;
  nap_ = kNap;
  if (operation.begun != operation.bytes.size())
    fail(operation.peer, fmt::format("sent {} bytes where {} were expected", operation.begun,
                                     operation.bytes.size()));
  if (!operation.is_send)
    std::copy_n(operation.copy.get(), operation.begun, operation.bytes.data());
  tickets_.remove(ticket);
  return true;
}

// MPI has nothing to sleep on: short naps that grow, so that a rank that waits leaves its core.
void MpiTransport::wait(Clock::duration at_most) {
  check_open();
  std::this_thread::sleep_for(std::min(at_most, nap_));
  nap_ = std::min<Clock::duration>(2 * nap_, kLongNap);
}

// What MPI goes on with keeps its memory, for good.
void MpiTransport::abort() noexcept {
  if (std::exchange(aborted_, true)) return;
  tickets_.for_each([&](Operation& operation) {
    bool over = true;
    for (MPI_Request& request : operation.requests) {
      if (request == MPI_REQUEST_NULL) continue;
      int done = 0;
      over &= MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done;
    }
    if (!over) static_cast<void>(operation.copy.release());
  });
}

class MpiEndpoint final : public Endpoint {
 public:
  MpiEndpoint() {
    begin_mpi();
    address_ = fmt::format("{}{}", kPrefix, world(MPI_Comm_rank));
  }
  std::string_view name() const override { return "mpi"; }
  std::string address() const override { return address_; }
  std::unique_ptr<Transport> connect(const std::vector<std::string>& addresses, int rank,
                                     const ConnectOptions& options) override {
    std::vector<int> ranks;
    for (const std::string& address : addresses) {
      int number = -1;
      if (address.starts_with(kPrefix))
        std::from_chars(address.data() + kPrefix.size(), address.data() + address.size(), number);
      if (number < 0 || number >= world(MPI_Comm_size))
        throw ConfigError(fmt::format("'{}' is no rank of MPI's", address.substr(0, 100)),
                          "the engine mpi needs all ranks to be started by one mpirun or srun");
      ranks.push_back(number);
    }
    LOCKSTEP_CHECK(rank >= 0 && rank < static_cast<int>(ranks.size()) &&
                   ranks[rank] == world(MPI_Comm_rank));
    return std::make_unique<MpiTransport>(std::move(ranks), rank, options.generation);
  }

 private:
  std::string address_;
};

}  // namespace

std::string mpi_unavailable() { return ""; }
std::unique_ptr<Endpoint> make_mpi_endpoint() { return std::make_unique<MpiEndpoint>(); }

std::vector<std::string> exchange_by_mpi(const std::string& own) {
  LOCKSTEP_CHECK(own.size() <= kMostAddressBytes);
  begin_mpi();
  const int size = world(MPI_Comm_size);
  constexpr std::size_t kSlot = kMostAddressBytes + 1;
  std::vector<char> mine(kSlot), all(kSlot * static_cast<std::size_t>(size));
  std::ranges::copy(own, mine.begin());
  check(MPI_Allgather(mine.data(), static_cast<int>(kSlot), MPI_CHAR, all.data(),
                      static_cast<int>(kSlot), MPI_CHAR, MPI_COMM_WORLD),
        "exchanging addresses");
  std::vector<std::string> texts;
  for (int rank = 0; rank < size; ++rank)
    texts.emplace_back(all.data() + kSlot * static_cast<std::size_t>(rank));
  return texts;
}

}  // namespace lockstep
