// Point-to-point between the ranks of one group on different nodes: what the plans of collective/
// run over. An Endpoint is a process's end of an engine (ucx, mpi, zmq, loopback): it lasts for the
// process's life. A Transport is its connections within one generation: made anew for the next one,
// in the same process.
//
// Who owns what: whoever made it; a Transport must end before its Endpoint. Bytes handed to send()
// and receive() stay the caller's and must live, unchanged by him, until done(), or until abort()
// has returned. Threads: one at a time for an Endpoint and all its Transports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/base/dtype.h"
#include "lockstep/base/error.h"

namespace lockstep {

// What an engine says of a connection: "ucx: rank 1 (10.0.0.2:4711): connection reset".
class TransportError : public CommError {
 public:
  TransportError(int peer, const std::string& message) : CommError(message), peer_(peer) {}
  int peer() const { return peer_; }  // -1: not known which

 private:
  int peer_;
};

class Transport {
 public:
  // Of an operation under way. Given back by done() when that returns true.
  using Ticket = std::uint32_t;

  // Like abort(), but what done() has said was sent still arrives, if it can at once.
  virtual ~Transport() = default;
  virtual std::string_view name() const = 0;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // "rank 1 (10.0.0.2:4711)", for messages.
  virtual std::string describe(int peer) const = 0;

  // The n-th send to a rank on a channel meets that rank's n-th receive from this one there; their
  // lengths must be equal, else one of the two throws. Never waits; needs no receive to be there.
  virtual Ticket send(int to, std::uint16_t channel, std::span<const std::byte> bytes) = 0;
  virtual Ticket receive(int from, std::uint16_t channel, std::span<std::byte> bytes) = 0;
  // Moves what can be moved, then: is the operation over? Once only: true ends the ticket. Throws
  // TransportError when it failed, and from then on for that peer whenever it would be false.
  virtual bool done(Ticket ticket) = 0;
  // Sleeps until something has moved since it last returned; `at_most`: up to who asks. Who asks
  // for several operations in turn misses none that ends while he asks for another.
  virtual void wait(Clock::duration at_most) = 0;
  // Everything under way ends; none of the bytes is touched any more. For good: further calls
  // throw, and the peers are told.
  virtual void abort() noexcept = 0;
};

// Of an engine that reduces by itself, in an order of its own: MPI.
class ReducingTransport : public Transport {
 public:
  enum class Combining : std::uint8_t { sum, min, max, product };
  // Of `members`, who all begin it, and one such at a time: not before each knows that the others
  // do. `data` is the result when done(). dtype: of 32 or 64 bits.
  virtual Ticket all_reduce(const std::vector<int>& members, std::span<std::byte> data, Dtype dtype,
                            Combining combining) = 0;
};

struct ConnectOptions {
  std::uint64_t generation = 0;  // what is left of others must not be taken for this one's
  Deadline deadline = Deadline::never();
};

class Endpoint {
 public:
  virtual ~Endpoint() = default;
  virtual std::string_view name() const = 0;
  // For the peers: at most kMostAddressBytes, of no meaning to others.
  virtual std::string address() const = 0;
  // Every rank's address by rank, this one's included. Collective over them, may return before the
  // others have come. Once a generation. Throws TransportError, ConfigError for an address that is
  // none.
  virtual std::unique_ptr<Transport> connect(const std::vector<std::string>& addresses, int rank,
                                             const ConnectOptions& options) = 0;
};
inline constexpr std::size_t kMostAddressBytes = 2048;

enum class Engine : std::uint8_t { ucx, mpi, zmq };
std::string_view name_of(Engine engine);
Engine engine_from(std::string_view name);  // throws ConfigError with the nearest name

struct EndpointOptions {
  // Of the interface to use, "eth0" or an address of it; "": the one that leads to `towards`.
  std::string interface = {};
  std::string towards = {};  // the coordinator's host; "": this node alone, loopback
  std::string key = {};      // the job's secret: zmq encrypts with it; "": none
};
// Why an engine can't be had in this build or on this machine; "": it can.
std::string unavailable(Engine engine);
// Throws ConfigError where unavailable() says why, or the interface is none.
std::unique_ptr<Endpoint> make_endpoint(Engine engine, const EndpointOptions& options);
// Every rank's text by rank, among all that mpirun or srun started: the addresses of another
// engine. At most kMostAddressBytes each. Throws ConfigError where unavailable(Engine::mpi) says
// why.
std::vector<std::string> exchange_by_mpi(const std::string& own);

// For tests: endpoints of one process, for ranks that are threads.
class LoopbackHub;
std::shared_ptr<LoopbackHub> make_loopback_hub();
std::unique_ptr<Endpoint> make_loopback_endpoint(std::shared_ptr<LoopbackHub> hub);

}  // namespace lockstep
