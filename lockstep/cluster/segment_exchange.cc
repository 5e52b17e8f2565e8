#include "lockstep/cluster/segment_exchange.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/cluster/descriptors.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

constexpr auto kRetry = std::chrono::milliseconds(10);
constexpr auto kPatience = std::chrono::seconds(5);  // with the system and with a slow peer
constexpr std::uint64_t kMagic = 0x31706574736b636c;

// What a rank says when it comes.
struct Hello {
  std::uint64_t magic = kMagic;
  std::uint64_t generation = 0;
  std::int32_t local_rank = 0;
  std::int32_t local_size = 0;
  std::int32_t size = 0;
  std::int32_t reserved = 0;
};

// What local rank 0 answers: a descriptor beside an empty text, or what is wrong.
struct Answer {
  char problem[256] = {};
};

Deadline sooner(const Deadline& deadline, Clock::duration patience) {
  return Deadline::after(std::min<Clock::duration>(deadline.remaining(), patience));
}

struct Address {
  sockaddr_un name{};
  socklen_t length = 0;
};

Address address_of(const Place& place) {
  // Without an id, the launcher's process on this node tells its jobs apart.
  const std::string id = place.job_id.empty()
                             ? fmt::format("{}.{}", name_of(place.launcher), ::getppid())
                             : place.job_id;
  const std::string name =
      fmt::format("lockstep.{}.{:.32}", ::getuid(), sha256_hex(as_byte_span(id)));
  Address address;
  address.name.sun_family = AF_UNIX;  // sun_path[0] stays 0: abstract, nowhere in a file system
  std::memcpy(address.name.sun_path + 1, name.data(), name.size());
  address.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

UniqueFd make_socket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd) throw CommError("cannot join the job: no socket: " + errno_text(errno));
  return fd;
}

bool wait_readable(int fd, const Deadline& deadline) {
  for (;;) {
    pollfd poll_fd{fd, POLLIN, 0};
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline.remaining()).count();
    const int ready = ::poll(&poll_fd, 1, static_cast<int>(std::min<long long>(left, 1 << 30)));
    if (ready > 0) return true;
    if (ready == 0 && deadline.expired()) return false;
  }
}

bool same_user(int fd) {
  ucred peer{};
  socklen_t length = sizeof peer;
  return ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.uid == ::getuid();
}

void send_answer(int fd, const std::string& problem, int segment_fd) {
  Answer answer;
  std::memcpy(answer.problem, problem.data(), std::min(problem.size(), sizeof(answer.problem) - 1));
  const std::span one(&segment_fd, 1);
  // A peer that has gone is noticed by the group.
  send_with_descriptors(fd, {reinterpret_cast<const char*>(&answer), sizeof answer},
                        segment_fd >= 0 ? one : one.first(0), 0);
}

UniqueFd receive_answer(int fd, const Deadline& deadline) {
  if (!wait_readable(fd, deadline))
    throw CommError("cannot join the job: local rank 0 waits for ranks that did not come in time");
  Answer answer;
  ReceivedMessage message =
      receive_with_descriptors(fd, {reinterpret_cast<char*>(&answer), sizeof answer});
  if (message.bytes != sizeof answer)
    throw CommError("cannot join the job: local rank 0 ended before the job began");
  answer.problem[sizeof answer.problem - 1] = '\0';
  if (answer.problem[0] != '\0') throw CommError(answer.problem);
  if (message.descriptors.empty())
    throw CommError("cannot join the job: local rank 0 sent no segment");
  return std::move(message.descriptors.back());
}

UniqueFd take_name(const Place& place, const Deadline& deadline) {
  const Address address = address_of(place);
  UniqueFd listener = make_socket();
  // The last job of this name may be on its way out.
  const Deadline patience = sooner(deadline, kPatience);
  while (::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address.name), address.length) !=
         0) {
    if (errno != EADDRINUSE || patience.expired())
      throw CommError(
          fmt::format("cannot join the job: its name on this node is taken ({}): does "
                      "another job started by {} with the same id run here?",
                      errno_text(errno), name_of(place.launcher)));
    std::this_thread::sleep_for(kRetry);
  }
  if (::listen(listener.get(), 1024) != 0)
    throw CommError("cannot join the job: listen: " + errno_text(errno));
  return listener;
}

// Accepts the others; throws CommError once one does not fit. peers[i]: of local rank i.
void gather(int listener, const Place& place, const Deadline& deadline,
            std::vector<UniqueFd>& peers) {
  for (int missing = place.local_size - 1; missing > 0;) {
    if (!wait_readable(listener, deadline)) {
      std::vector<int> absent;
      for (int rank = 1; rank < place.local_size; ++rank)
        if (!peers[std::size_t(rank)]) absent.push_back(rank);
      throw CommError(fmt::format("cannot join the job: of {} local ranks, {} did not come in time",
                                  place.local_size, fmt::join(absent, ", ")));
    }
    UniqueFd peer(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    Hello hello;
    if (!peer || !same_user(peer.get()) ||
        !wait_readable(peer.get(), sooner(deadline, kPatience)) ||
        ::recv(peer.get(), &hello, sizeof hello, 0) != sizeof hello || hello.magic != kMagic)
      continue;  // not one of ours
    const bool fits = hello.local_size == place.local_size && hello.size == place.size &&
                      hello.generation == place.generation && hello.local_rank > 0 &&
                      hello.local_rank < place.local_size;
    const bool twice = fits && peers[std::size_t(hello.local_rank)];
    if (!fits || twice) {
      const std::string problem = fmt::format(
          "cannot join the job: local rank {} of {} {}: two jobs with the same id on this node?",
          hello.local_rank, hello.local_size,
          twice ? "came twice" : fmt::format("came to a job of {}", place.local_size));
      send_answer(peer.get(), problem, -1);
      throw CommError(problem);
    }
    peers[std::size_t(hello.local_rank)] = std::move(peer);
    --missing;
  }
}

SharedSegment make_and_pass(const Place& place, const Deadline& deadline) {
  SharedSegment shared;
  shared.name = take_name(place, deadline);
  std::vector<UniqueFd> peers(static_cast<std::size_t>(place.local_size));
  const auto answer_all = [&](const std::string& problem, int fd) {
    for (const UniqueFd& peer : peers)
      if (peer) send_answer(peer.get(), problem, fd);
  };
  try {
    gather(shared.name.get(), place, deadline, peers);
    shared.segment = Segment::create({.seats = place.local_size});
  } catch (const Error& error) {
    answer_all(error.what(), -1);
    throw;
  }
  answer_all("", shared.segment->fd());
  return shared;
}

SharedSegment receive(const Place& place, const Deadline& deadline) {
  const Address address = address_of(place);
  UniqueFd fd = make_socket();
  while (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address.name), address.length) !=
         0) {
    const int reason = errno;  // ECONNREFUSED: nobody has the name yet
    if (deadline.expired())
      throw CommError(
          fmt::format("cannot join the job: local rank 0 of {} did not come in time "
                      "({})",
                      place.local_size, errno_text(reason)));
    std::this_thread::sleep_for(kRetry);
  }
  if (!same_user(fd.get()))
    throw CommError("cannot join the job: another user holds its name on this node");
  const Hello hello{.generation = place.generation,
                    .local_rank = place.local_rank,
                    .local_size = place.local_size,
                    .size = place.size};
  ::send(fd.get(), &hello, sizeof hello, MSG_NOSIGNAL);
  return {Segment::attach(receive_answer(fd.get(), deadline)), UniqueFd()};
}

}  // namespace

SharedSegment exchange_segment(const Place& place, const Deadline& deadline) {
  SharedSegment shared =
      place.local_rank == 0 ? make_and_pass(place, deadline) : receive(place, deadline);
  if (shared.segment->seats() != place.local_size)
    throw CommError(fmt::format("cannot join the job: its segment is for {} ranks, not {}",
                                shared.segment->seats(), place.local_size));
  return shared;
}

}  // namespace lockstep
