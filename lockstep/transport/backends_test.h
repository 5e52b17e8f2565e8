// For tests alone: what the conformance suite runs against, and with. A new engine is one more line
// in backends().
#pragma once

#include <gtest/gtest.h>

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "lockstep/transport/nodes_test.h"

namespace lockstep {

inline constexpr Clock::duration kTestTimeout = std::chrono::seconds(60);

// One rank of a test, in a thread or process of its own.
struct Member {
  Endpoint& endpoint;
  std::vector<std::string> addresses;
  int rank = 0;
  std::uint64_t generations_before = 0;  // of this endpoint

  int size() const { return static_cast<int>(addresses.size()); }
  std::unique_ptr<Transport> connect(std::uint64_t generation = 1) const {
    return endpoint.connect(
        addresses, rank,
        {.generation = generations_before + generation, .deadline = Deadline::after(kTestTimeout)});
  }
};
using Body = std::function<void(const Member&)>;

struct Backend {
  std::string name;
  // Calls body as every one of `size` ranks. What it throws fails the test.
  std::function<void(int size, const Body& body)> run;
  bool tells_of_an_end = true;  // of a peer
};
inline void PrintTo(const Backend& backend, std::ostream* out) { *out << backend.name; }

inline void run_loopback(int size, const Body& body) {
  const auto hub = make_loopback_hub();
  std::vector<std::unique_ptr<Endpoint>> endpoints;
  std::vector<std::string> addresses;
  for (int rank = 0; rank < size; ++rank) {
    endpoints.push_back(make_loopback_endpoint(hub));
    addresses.push_back(endpoints.back()->address());
  }
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      try {
        body({*endpoints[rank], addresses, rank});
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
      }
    });
}

// Processes of this node: this program's forks, since an engine is made after a fork. `killed`: the
// rank that must end by SIGKILL or SIGABRT.
inline void run_processes(Engine engine, const EndpointOptions& options, int size, const Body& body,
                          int killed = -1) {
  struct Shared {
    pthread_barrier_t all;
    std::array<std::array<char, kMostAddressBytes + 1>, 16> addresses;
  };
  void* const memory =
      ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  LOCKSTEP_CHECK(memory != MAP_FAILED);
  auto* const shared = new (memory) Shared{};
  pthread_barrierattr_t across_processes;
  ::pthread_barrierattr_init(&across_processes);
  ::pthread_barrierattr_setpshared(&across_processes, PTHREAD_PROCESS_SHARED);
  ::pthread_barrier_init(&shared->all, &across_processes, size);
  std::fflush(stdout);
  std::vector<pid_t> pids;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t pid = ::fork();
    LOCKSTEP_CHECK(pid >= 0);
    pids.push_back(pid);
    if (pid != 0) continue;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    try {
      const auto endpoint = make_endpoint(engine, options);
      std::ranges::copy(endpoint->address(), shared->addresses[rank].begin());
      ::pthread_barrier_wait(&shared->all);
      Member member{*endpoint, {}, rank};
      for (int i = 0; i < size; ++i) member.addresses.emplace_back(shared->addresses[i].data());
      body(member);
    } catch (const std::exception& error) {
      ADD_FAILURE() << "rank " << rank << ": " << error.what();
    }
    std::fflush(stdout);
    ::_exit(::testing::Test::HasFailure() ? 1 : 0);
  }
  for (int rank = 0; rank < size; ++rank) {
    int status = -1;
    ::waitpid(pids[rank], &status, 0);
    EXPECT_TRUE(rank == killed ? WIFSIGNALED(status) &&
                                     (WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGABRT)
                               : status == 0)
        << "rank " << rank << ": " << status;
  }
  ::munmap(memory, sizeof(Shared));
}

// The processes that mpirun has started, of which the first `size` take part.
inline void run_mpi(int size, const Body& body) {
  static const auto endpoint = make_endpoint(Engine::mpi, {});
  std::vector<std::string> addresses = exchange_by_mpi(endpoint->address());
  const auto rank =
      static_cast<int>(std::ranges::find(addresses, endpoint->address()) - addresses.begin());
  ASSERT_GE(addresses.size(), size) << "mpirun -np";
  addresses.resize(size);
  try {
    if (rank < size) body({*endpoint, addresses, rank});
  } catch (const std::exception& error) {
    ADD_FAILURE() << "rank " << rank << ": " << error.what();
  }
  exchange_by_mpi("");
}

// The ranks of several nodes, of which this process is one.
inline void run_test_nodes(int size, const Body& body) {
  constexpr std::uint64_t kGenerations = 10;  // of one body, at most
  static std::uint64_t before = 0;            // in step on all nodes
  const TestNode& here = *test_node();
  here.run(size, [&](int rank) {
    body({*here.endpoints[rank - here.first],
          {here.addresses.begin(), here.addresses.begin() + size},
          rank,
          before});
  });
  before += kGenerations;
}

inline std::vector<Backend> backends() {
  if (std::getenv("OMPI_COMM_WORLD_SIZE")) return {{"Mpi", run_mpi, false}};
  if (test_node()) return {{"Nodes", run_test_nodes}};
  std::vector<Backend> all = {{"Loopback", run_loopback}};
  if (unavailable(Engine::ucx).empty())
    all.push_back(
        {"Ucx", [](int size, const Body& body) { run_processes(Engine::ucx, {}, size, body); }});
  for (const auto& [name, key] : {std::pair("Zmq", "secret"), {"ZmqInTheClear", ""}})
    all.push_back({name, [key = key](int size, const Body& body) {
                     run_processes(Engine::zmq, {.key = key}, size, body);
                   }});
  return all;
}

// Until the operation is over.
inline void finish(Transport& transport, Transport::Ticket ticket) {
  const Deadline deadline = Deadline::after(kTestTimeout);
  while (!transport.done(ticket)) {
    if (deadline.expired()) throw Error("test: an operation is not over in time");
    transport.wait(deadline.remaining());
  }
}
inline void finish(Transport& transport, const std::vector<Transport::Ticket>& tickets) {
  for (const Transport::Ticket ticket : tickets) finish(transport, ticket);
}
// What `work` throws; fails where it throws nothing.
inline std::string error_of(const std::function<void()>& work, int* peer = nullptr) {
  try {
    work();
  } catch (const TransportError& error) {
    if (peer) *peer = error.peer();
    return error.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

// Bytes that tell where they came from.
inline std::vector<std::byte> pattern(std::size_t bytes, unsigned seed) {
  std::vector<std::byte> data(bytes);
  for (std::size_t i = 0; i < bytes; ++i)
    data[i] = static_cast<std::byte>((i * 7 + (i >> 8) * 13 + seed * 31) & 0xff);
  return data;
}

// All ranks have come here.
inline void meet(Transport& transport, std::uint16_t channel = 65535) {
  std::vector<Transport::Ticket> tickets;
  for (int peer = 0; peer < transport.size(); ++peer) {
    if (peer == transport.rank()) continue;
    tickets.push_back(transport.receive(peer, channel, {}));
    tickets.push_back(transport.send(peer, channel, {}));
  }
  finish(transport, tickets);
}

}  // namespace lockstep
