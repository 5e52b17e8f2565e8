// The raw TCP side of ../nodes.py: two processes that each send the other so many bytes and receive
// as many, both directions at once, over one connection: what an all_reduce of two ranks moves at
// least. Timed in the same way as the others: batches of exchanges after a barrier, a batch as long
// as on the slower rank, the median over batches.
//
//   tcp RANK ADDRESS WAY BUFFER PIECE exchange:BYTES:BATCH:BATCHES …   a JSON line each on rank 0
//
// ADDRESS is rank 0's. WAY: spin (never sleeps), poll, or threads (one sends, one receives, both
// block). BUFFER: bytes of the socket's, each way; 0: what the kernel chooses. PIECE: bytes that
// one call sends or receives at most: small ones are still in the cache when the other side copies
// them.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
enum class Way { spin, poll, threads };
constexpr std::uint16_t kPort = 4712;

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

void check(bool holds, const char* what) {
  if (!holds) fail(what);
}

// How far one direction got by one call; `moved` is what send or recv returned.
std::size_t advanced(ssize_t moved) {
  if (moved > 0) return static_cast<std::size_t>(moved);
  check(moved < 0 && (errno == EAGAIN || errno == EINTR), "send or recv");
  return 0;
}

class Peer {
 public:
  Peer(int fd, Way way, std::size_t piece) : fd_(fd), way_(way), piece_(piece) {}

  void exchange(const std::vector<char>& out, std::vector<char>& in, std::size_t bytes) {
    if (way_ == Way::threads && bytes >= kThreadsFrom) return in_two_threads(out, in, bytes);
    const int flags = way_ == Way::threads ? 0 : MSG_DONTWAIT;
    std::size_t sent = 0, received = 0;
    while (sent < bytes || received < bytes) {
      std::size_t step = 0;
      if (sent < bytes) {
        step = advanced(
            ::send(fd_, out.data() + sent, std::min(piece_, bytes - sent), flags | MSG_NOSIGNAL));
        sent += step;
      }
      if (received < bytes) {
        const std::size_t more =
            advanced(::recv(fd_, in.data() + received, std::min(piece_, bytes - received), flags));
        received += more;
        step += more;
      }
      if (step == 0 && way_ == Way::poll) {
        pollfd what{
            fd_, static_cast<short>((sent < bytes ? POLLOUT : 0) | (received < bytes ? POLLIN : 0)),
            0};
        check(::poll(&what, 1, -1) >= 0, "poll");
      }
    }
  }

 private:
  static constexpr std::size_t kThreadsFrom = 64 << 10;  // what the other's buffer takes anyway

  void in_two_threads(const std::vector<char>& out, std::vector<char>& in, std::size_t bytes) {
    std::thread sender([&] {
      for (std::size_t sent = 0; sent < bytes;)
        sent +=
            advanced(::send(fd_, out.data() + sent, std::min(piece_, bytes - sent), MSG_NOSIGNAL));
    });
    for (std::size_t received = 0; received < bytes;)
      received += advanced(
          ::recv(fd_, in.data() + received, std::min(piece_, bytes - received), MSG_WAITALL));
    sender.join();
  }

  const int fd_;
  const Way way_;
  const std::size_t piece_;
};

// Before the connection, so that the window can be as large.
void set_options(int fd, int buffer_bytes) {
  const int one = 1;
  check(::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0, "SO_REUSEADDR");
  check(::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) == 0, "TCP_NODELAY");
  for (const int which : {SO_SNDBUF, SO_RCVBUF})
    if (buffer_bytes > 0)
      check(::setsockopt(fd, SOL_SOCKET, which == SO_SNDBUF ? SO_SNDBUFFORCE : SO_RCVBUFFORCE,
                         &buffer_bytes, sizeof buffer_bytes) == 0,
            "the buffer's size");
}

int connect_to(int rank, const char* address, int buffer_bytes) {
  sockaddr_in place{};
  place.sin_family = AF_INET;
  place.sin_port = htons(kPort);
  check(::inet_pton(AF_INET, address, &place.sin_addr) == 1, address);
  const auto* const name = reinterpret_cast<const sockaddr*>(&place);
  for (const auto begin = Clock::now(); Clock::now() - begin < std::chrono::seconds(20);) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    check(fd >= 0, "socket");
    set_options(fd, buffer_bytes);
    if (rank == 0) {
      check(::bind(fd, name, sizeof place) == 0 && ::listen(fd, 1) == 0, address);
      const int peer = ::accept(fd, nullptr, nullptr);
      check(peer >= 0, "accept");
      set_options(peer, 0);
      return peer;
    }
    if (::connect(fd, name, sizeof place) == 0) return fd;
    ::close(fd);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));  // rank 0 is not there yet
  }
  fail("nobody at rank 0's address");
}

void measure(Peer& peer, int rank, const std::string& operation, std::size_t bytes, long batch,
             std::size_t batches) {
  std::vector<char> data(bytes, static_cast<char>(rank + 1)), token(1);
  {
    std::vector<char> in(bytes);
    peer.exchange(data, in, bytes);
    check(in == std::vector<char>(bytes, static_cast<char>(2 - rank)), "wrong bytes came");
  }
  // From now on what comes goes to where the other's came from, as in an all_reduce in place: half
  // the memory to touch.
  for (long i = 0; i < std::max(batch, 5L); ++i) peer.exchange(data, data, bytes);
  std::vector<double> us(batches);
  for (double& mean : us) {
    peer.exchange(std::vector<char>(1), token, 1);
    const auto begin = Clock::now();
    for (long i = 0; i < batch; ++i) peer.exchange(data, data, bytes);
    mean = std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / batch;
  }
  std::vector<char> mine(batches * sizeof(double)), others(mine.size());
  std::memcpy(mine.data(), us.data(), mine.size());
  peer.exchange(mine, others, mine.size());
  for (std::size_t i = 0; i < batches; ++i) {
    double other = 0;
    std::memcpy(&other, others.data() + i * sizeof(double), sizeof(double));
    us[i] = std::max(us[i], other);
  }
  std::sort(us.begin(), us.end());
  if (rank == 0)
    std::printf("{\"operation\": \"%s\", \"ranks\": 2, \"bytes\": %zu, \"time_us\": %.4f}\n",
                operation.c_str(), bytes, (us[(batches - 1) / 2] + us[batches / 2]) / 2);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) return 2;
  const int rank = std::atoi(argv[1]);
  const std::string way = argv[3];
  const int fd = connect_to(rank, argv[2], std::atoi(argv[4]));
  Peer peer(fd,
            way == "spin"   ? Way::spin
            : way == "poll" ? Way::poll
                            : Way::threads,
            std::strtoull(argv[5], nullptr, 10));
  for (int i = 6; i < argc; ++i) {
    char operation[32];
    std::size_t bytes = 0, batches = 0;
    long batch = 0;
    if (std::sscanf(argv[i], "%31[^:]:%zu:%ld:%zu", operation, &bytes, &batch, &batches) != 4)
      return 2;
    measure(peer, rank, operation, bytes, batch, batches);
  }
}
