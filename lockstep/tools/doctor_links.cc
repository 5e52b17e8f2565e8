#include "lockstep/tools/doctor_links.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr auto kSlice = std::chrono::milliseconds(50);         // of a wait
constexpr auto kSpin = std::chrono::microseconds(100);         // before it: a round trip takes less
constexpr auto kLatencyTime = std::chrono::milliseconds(200);  // of a pair's round trips
constexpr int kRoundTrips = 200, kLeastRoundTrips = 5;
constexpr auto kLongEnough = std::chrono::milliseconds(100);  // of a message whose time counts
constexpr std::uint64_t kFirstBytes = 64 << 10, kMostBytes = 32 << 20;
constexpr double kSlowBytesPerS = 130e6;  // up to 1 Gbit/s

// One end of all its pairs. Its memory must outlive the transport, which may still hold on to what
// was under way with a peer that was given up.
class Meter {
 public:
  Meter(Transport& transport, Clock::duration patience)
      : transport_(transport), patience_(patience), words_(2 * transport.size()) {}

  // `waiting`: until the peer has done with others.
  Link measure(int peer, Clock::duration waiting);

 private:
  void complete(Transport::Ticket ticket, int peer, Clock::duration patience);
  void send(int peer, std::span<const std::byte> bytes) {
    complete(transport_.send(peer, 0, bytes), peer, patience_);
  }
  void receive(int peer, std::span<std::byte> bytes) {
    complete(transport_.receive(peer, 0, bytes), peer, patience_);
  }
  std::span<std::byte> word(int peer, bool out) {
    return std::as_writable_bytes(std::span(&words_[2 * peer + (out ? 1 : 0)], 1));
  }
  void send_word(int peer, std::uint64_t value) {
    words_[2 * peer + 1] = value;
    send(peer, word(peer, true));
  }
  std::uint64_t receive_word(int peer) {
    receive(peer, word(peer, false));
    return words_[2 * peer];
  }
  double measure_latency(int peer);
  double measure_stream(int peer);  // to the peer, in bytes/s
  void echo(int peer);
  void drain(int peer);

  Transport& transport_;
  Clock::duration patience_;
  std::vector<std::uint64_t> words_;  // by peer, in and out
  std::vector<std::byte> buffer_ = std::vector<std::byte>(kMostBytes);
};

void Meter::complete(Transport::Ticket ticket, int peer, Clock::duration patience) {
  const Deadline deadline = Deadline::after(patience);
  const Deadline spin = Deadline::after(kSpin);
  while (!transport_.done(ticket)) {
    if (!spin.expired()) continue;
    if (deadline.expired())
      throw CommError(fmt::format("no word from {} for {:.3g} s", transport_.describe(peer),
                                  seconds(patience)));
    transport_.wait(std::min<Clock::duration>(kSlice, deadline.remaining()));
  }
}

// Each word is answered by one; 0 ends it.
double Meter::measure_latency(int peer) {
  std::vector<double> times;
  const Deadline enough = Deadline::after(kLatencyTime);
  const auto wanted = [&] {
    return times.size() < kLeastRoundTrips || (times.size() < kRoundTrips && !enough.expired());
  };
  while (wanted()) {
    const Clock::time_point start = Clock::now();
    send_word(peer, 1);
    receive_word(peer);
    times.push_back(seconds(Clock::now() - start));
  }
  send_word(peer, 0);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] / 2;
}

void Meter::echo(int peer) {
  while (receive_word(peer) != 0) send_word(peer, 1);
}

// Announces each message by its length, and waits until it is said to be there; 0 ends it.
double Meter::measure_stream(int peer) {
  double bandwidth = 0;
  for (std::uint64_t bytes = kFirstBytes; bytes <= kMostBytes; bytes *= 2) {
    send_word(peer, bytes);
    const Clock::time_point start = Clock::now();
    send(peer, std::span(buffer_).first(bytes));
    receive_word(peer);
    const Clock::duration taken = Clock::now() - start;
    bandwidth = static_cast<double>(bytes) / seconds(taken);
    if (taken > kLongEnough) break;
  }
  send_word(peer, 0);
  return bandwidth;
}

void Meter::drain(int peer) {
  while (const std::uint64_t bytes = receive_word(peer)) {
    if (bytes > kMostBytes) throw CommError(transport_.describe(peer) + " sends nonsense");
    receive(peer, std::span(buffer_).first(bytes));
    send_word(peer, 1);
  }
}

Link Meter::measure(int peer, Clock::duration waiting) {
  const int own = transport_.rank();
  Link link{std::min(own, peer), std::max(own, peer)};
  try {
    const Transport::Ticket hello = transport_.receive(peer, 0, word(peer, false));
    send_word(peer, 1);
    complete(hello, peer, waiting);
    if (own < peer) {
      link.latency_s = measure_latency(peer);
      link.there_bytes_per_s = measure_stream(peer);
      drain(peer);
      link.back_bytes_per_s = static_cast<double>(receive_word(peer));
    } else {
      echo(peer);
      drain(peer);
      send_word(peer, static_cast<std::uint64_t>(measure_stream(peer)));
    }
  } catch (const CommError& error) {
    link.failure = error.what();
  }
  return link;
}

std::string cell(double value) {
  return value > 0 ? fmt::format("{:.{}f}", value, value < 10 ? 2 : value < 100 ? 1 : 0) : "-";
}

}  // namespace

Link link_from(const nlohmann::json& json, int nodes) {
  auto link = received<Link>(json);
  if (link.from >= 0 && link.from < link.to && link.to < nodes) return link;
  throw Error("a node sent a link that is none");
}

// The circle method of round-robin tournaments: one stays, the others walk around.
std::vector<std::vector<std::pair<int, int>>> rounds_of_pairs(int nodes) {
  const int seats = nodes + nodes % 2;  // who sits opposite the empty one rests
  std::vector<std::vector<std::pair<int, int>>> rounds;
  for (int round = 0; round < seats - 1; ++round) {
    const auto at = [&](int seat) { return seat == 0 ? 0 : 1 + (seat - 1 + round) % (seats - 1); };
    std::vector<std::pair<int, int>> pairs;
    for (int seat = 0; seat < seats / 2; ++seat) {
      const auto [low, high] = std::minmax({at(seat), at(seats - 1 - seat)});
      if (high < nodes) pairs.emplace_back(low, high);
    }
    rounds.push_back(std::move(pairs));
  }
  return rounds;
}

std::vector<Link> measure_links(std::unique_ptr<Transport> transport, Clock::duration patience) {
  Meter meter(*transport, patience);
  std::vector<Link> links;
  Clock::duration waiting = patience;
  for (const auto& round : rounds_of_pairs(transport->size())) {
    for (const auto& [low, high] : round) {
      if (low != transport->rank() && high != transport->rank()) continue;
      const int peer = low == transport->rank() ? high : low;
      Link link = meter.measure(peer, waiting);
      if (peer == high || !link.failure.empty()) links.push_back(std::move(link));
    }
    waiting += patience;  // others may each have waited so long for one that never came
  }
  transport.reset();  // before the meter's memory goes
  return links;
}

std::vector<Link> merged(std::span<const std::vector<Link>> by_node) {
  std::map<std::pair<int, int>, Link> found;
  for (const std::vector<Link>& links : by_node)
    for (const Link& link : links) {
      const auto [place, is_new] = found.emplace(std::pair(link.from, link.to), link);
      if (!is_new && place->second.failure.empty()) place->second.failure = link.failure;
    }
  std::vector<Link> links;
  for (auto& [pair, link] : found) links.push_back(std::move(link));
  return links;
}

std::vector<Finding> findings_of(std::span<const Link> links) {
  std::vector<Finding> findings;
  std::vector<double> speeds;
  const Link* slowest = nullptr;
  const auto speed = [](const Link& link) {
    return std::min(link.there_bytes_per_s, link.back_bytes_per_s);
  };
  for (const Link& link : links) {
    if (!link.failure.empty()) {
      findings.push_back({Verdict::error, "links",
                          fmt::format("nodes {} and {}: {}", link.from, link.to, link.failure),
                          "a firewall must let all ports through between the nodes of a job"});
      continue;
    }
    speeds.push_back(speed(link));
    if (slowest == nullptr || speed(link) < speed(*slowest)) slowest = &link;
  }
  if (slowest == nullptr) return findings;
  const std::string text = fmt::format("the slowest, between nodes {} and {}, has {} MB/s",
                                       slowest->from, slowest->to, cell(speed(*slowest) / 1e6));
  std::nth_element(speeds.begin(), speeds.begin() + speeds.size() / 2, speeds.end());
  if (speed(*slowest) < speeds[speeds.size() / 2] / 2)
    findings.push_back({Verdict::warning, "links", text + ", less than half of what is usual here",
                        "a cable, a port or a switch: all wait for the slowest link"});
  else if (speed(*slowest) < kSlowBytesPerS)
    findings.push_back({Verdict::warning, "links", text,
                        "communication will take longer than computing: send less"});
  else
    findings.push_back({Verdict::ok, "links", text});
  return findings;
}

std::string table_of(std::span<const Link> links, int nodes) {
  using Matrix = std::vector<std::vector<double>>;
  Matrix latency(nodes, std::vector<double>(nodes)), bandwidth = latency;
  for (const Link& link : links) {
    latency[link.from][link.to] = latency[link.to][link.from] = link.latency_s * 1e6;
    bandwidth[link.from][link.to] = link.there_bytes_per_s / 1e6;
    bandwidth[link.to][link.from] = link.back_bytes_per_s / 1e6;
  }
  std::string text;
  const std::array<std::pair<const char*, const Matrix*>, 2> tables = {
      std::pair("latency, µs, one way", &latency),
      std::pair("bandwidth, MB/s, from a row's node to a column's", &bandwidth)};
  for (const auto& [title, values] : tables) {
    text += fmt::format("\n{}\n{:>10}", title, "");
    for (int node = 0; node < nodes; ++node) text += fmt::format("{:>10}", node);
    for (int from = 0; from < nodes; ++from) {
      text += fmt::format("\n{:>10}", from);
      for (const double value : (*values)[from]) text += fmt::format("{:>10}", cell(value));
    }
    text += '\n';
  }
  return text;
}

}  // namespace lockstep
