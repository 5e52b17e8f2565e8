// How the ranks of different nodes meet for the first time. Each sends each a hello with a random
// number in it, then a keyed digest of both hellos (HMAC-SHA256, RFC 2104): who does not know the
// key can't make it, and that of another meeting is of no use.
#include <fmt/format.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <numeric>
#include <type_traits>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/base/hash.h"
#include "lockstep/collective/remote_link.h"

namespace lockstep {
namespace {

constexpr std::uint64_t kMagic = 0x312d656d6f636c65;  // also of the order of bytes
constexpr std::uint32_t kVersion = 2;                 // of all that groups send
constexpr Clock::duration kSlice = std::chrono::milliseconds(50);
constexpr int kRounds = 5, kShifts = 3;  // the first ones open the way
constexpr std::size_t kShiftBytes = 256 << 10;
enum : std::uint16_t { kHelloChannel, kProofChannel, kShiftChannel, kChannels };

struct Hello {
  std::uint64_t magic = kMagic;
  std::uint32_t version = kVersion;
  std::uint32_t has_key = 0;
  std::uint64_t generation = 0;
  std::uint32_t rank = 0, size = 0;
  std::uint64_t machine = 0;  // which one
  std::uint32_t local_ranks = 0, exact = 0;
  std::uint64_t known_costs = 0;  // a digest; 0: none are
  std::array<std::uint8_t, 32> nonce{};
};
static_assert(std::has_unique_object_representations_v<Hello>);
using Proof = std::array<std::uint8_t, 32>;

std::uint64_t this_machine() {
  std::uint64_t digest = 0;
  try {
    for (const char byte : read_text_file("/proc/sys/kernel/random/boot_id"))
      digest = mix({digest, static_cast<std::uint8_t>(byte)});
  } catch (const Error&) {  // all such machines count as one, which then sleeps sooner
  }
  return digest;
}

Proof proof_of(const std::string& key, const Hello& prover, const Hello& verifier) {
  std::array<std::uint8_t, 2 * sizeof(Hello)> text{};
  std::memcpy(text.data(), &prover, sizeof(Hello));
  std::memcpy(text.data() + sizeof(Hello), &verifier, sizeof(Hello));
  Proof proof{};
  LOCKSTEP_CHECK(HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()), text.data(),
                      text.size(), proof.data(), nullptr) != nullptr);
  return proof;
}

class Join {
 public:
  Join(RemoteLink& link, const GroupOptions& options)
      : link_(link),
        transport_(*link.transport),
        options_(options),
        deadline_(options.timeout > std::chrono::hours(24 * 365)
                      ? Deadline::never()
                      : Deadline::after(options.timeout)) {
    mine_.has_key = !options.key.empty();
    mine_.generation = options.generation;
    mine_.rank = transport_.rank();
    mine_.size = transport_.size();
    mine_.machine = this_machine();
    mine_.local_ranks = options.local_ranks;
    mine_.exact = options.exact;
    if (options.known_costs) mine_.known_costs = find_costs(options.known_costs->by_members);
    LOCKSTEP_CHECK(RAND_bytes(mine_.nonce.data(), static_cast<int>(mine_.nonce.size())) == 1);
  }

  void run() {
    const auto hellos = exchange<Hello>(kHelloChannel, [&](int) { return mine_; });
    int crowd = options_.local_ranks;
    for (int rank = 0; rank < transport_.size(); ++rank) {
      if (rank == transport_.rank()) continue;
      check(rank, hellos[rank]);
      if (hellos[rank].machine == mine_.machine)
        crowd += static_cast<int>(std::min<std::uint32_t>(hellos[rank].local_ranks, 1 << 16));
    }
    const auto proofs = exchange<Proof>(
        kProofChannel, [&](int rank) { return proof_of(options_.key, mine_, hellos[rank]); });
    for (int rank = 0; rank < transport_.size(); ++rank)
      if (rank != transport_.rank() &&
          CRYPTO_memcmp(proofs[rank].data(), proof_of(options_.key, hellos[rank], mine_).data(),
                        sizeof(Proof)) != 0)
        fail(fmt::format("{} has another key for this job", transport_.describe(rank)));
    // Ranks that don't know the same measure anew, all of them.
    const auto knows = [&](const Hello& theirs) { return theirs.known_costs == mine_.known_costs; };
    const bool known = std::ranges::count_if(hellos, knows) >= transport_.size() - 1;
    if (mine_.known_costs == 0 || !known) measure();
    if (options_.known_costs) options_.known_costs->by_members[members_] = link_.costs;
    cpu_set_t cores;
    link_.may_spin =
        ::sched_getaffinity(0, sizeof(cores), &cores) == 0 && crowd <= CPU_COUNT(&cores);
    link_.next_channel = kChannels;
  }

 private:
  using Open = std::vector<std::pair<int, Transport::Ticket>>;  // with which rank

  // Those of the same ranks, from before.
  std::uint64_t find_costs(const std::map<std::string, LinkCosts>& by_members) {
    for (int rank = 0; rank < transport_.size(); ++rank)
      members_ += transport_.describe(rank) + (options_.exact ? "" : "*") + '\n';
    const auto found = by_members.find(members_);
    if (found == by_members.end()) return 0;
    link_.costs = found->second;
    const auto word = [](double value) { return std::bit_cast<std::uint64_t>(value); };
    return 1 | mix({word(link_.costs.latency_s), word(link_.costs.bandwidth_bytes_per_s),
                    word(link_.costs.engine_s), word(link_.costs.engine_bytes_per_s)});
  }

  // The best of a few rounds of everybody with everybody, a shift around the ring, and the engine's
  // own all_reduce; of these the slowest rank's.
  void measure() {
    if (transport_.size() == 1) return;
    struct Measured {
      double latency_s = 10, shift_s = 100, engine_s = 100, engine_shift_s = 100;
    } mine;
    const auto time = [](double& best, auto&& what) {
      const auto began = Clock::now();
      what();
      best = std::min(best, seconds(Clock::now() - began));
    };
    for (int round = 0; round < kRounds; ++round)
      time(mine.latency_s, [&] { exchange<std::uint64_t>(kHelloChannel, [](int) { return 0; }); });
    const std::span<std::byte> place = link_.lasting(2 * kShiftBytes);
    const int size = transport_.size(), rank = transport_.rank();
    const int from = (rank + size - 1) % size, to = (rank + 1) % size;
    for (int round = 0; round < kShifts; ++round)
      time(mine.shift_s, [&] {
        finish({{from, transport_.receive(from, kShiftChannel, place.first(kShiftBytes))},
                {to, transport_.send(to, kShiftChannel, place.last(kShiftBytes))}});
      });
    const bool reduces = link_.reducing && !options_.exact;
    for (int round = 0; reduces && round < kShifts; ++round) {
      time(mine.engine_s, [&] { reduce(place.first(sizeof(float))); });
      time(mine.engine_shift_s, [&] { reduce(place.first(kShiftBytes)); });
    }
    link_.memory.pop_back();
    auto all = exchange<Measured>(kHelloChannel, [&](int) { return mine; });
    all[rank] = mine;
    const auto slowest = [&](double Measured::*what) {
      double value = 1e-7;
      for (const Measured& one : all) value = std::max(value, std::min(one.*what, 100.0));
      return value;
    };
    const auto bandwidth = [](double idle_s, double busy_s) {
      return kShiftBytes / std::max(busy_s - idle_s, busy_s / 10);
    };
    LinkCosts& costs = link_.costs;
    costs = {.latency_s = slowest(&Measured::latency_s)};
    costs.bandwidth_bytes_per_s = bandwidth(costs.latency_s, slowest(&Measured::shift_s));
    if (!reduces) return;
    costs.engine_s = slowest(&Measured::engine_s);
    costs.engine_bytes_per_s = bandwidth(costs.engine_s, slowest(&Measured::engine_shift_s));
  }

  void reduce(std::span<std::byte> data) {
    std::vector<int> everybody(transport_.size());
    std::iota(everybody.begin(), everybody.end(), 0);
    finish({{-1, link_.reducing->all_reduce(everybody, data, Dtype::float32,
                                            ReducingTransport::Combining::max)}});
  }

  // What each rank sends this one, by rank; of_mine(rank) goes to it.
  template <typename Message, typename OfMine>
  std::vector<Message> exchange(std::uint16_t channel, OfMine&& of_mine) {
    const int size = transport_.size();
    const std::span<std::byte> place = link_.lasting(2 * size * sizeof(Message));
    const auto part = [&](int number) {
      return place.subspan(number * sizeof(Message), sizeof(Message));
    };
    Open open;
    for (int rank = 0; rank < size; ++rank) {
      if (rank == transport_.rank()) continue;
      const Message message = of_mine(rank);
      std::memcpy(part(size + rank).data(), &message, sizeof(Message));
      open.emplace_back(rank, transport_.receive(rank, channel, part(rank)));
      open.emplace_back(rank, transport_.send(rank, channel, part(size + rank)));
    }
    finish(std::move(open));
    std::vector<Message> messages(size);
    std::memcpy(messages.data(), place.data(), size * sizeof(Message));
    link_.memory.pop_back();
    return messages;
  }

  void finish(Open open) {
    while (!open.empty())
      if (std::erase_if(open, [&](const auto& one) { return transport_.done(one.second); }) == 0)
        wait(open);
  }

  void wait(const Open& open) {
    const std::string over = options_.is_over ? options_.is_over() : "";
    if (!over.empty()) fail(fmt::format("generation {} is over: {}", options_.generation, over));
    if (deadline_.expired()) {
      std::string late;
      for (int last = -1; const auto& [rank, ticket] : open)
        if (std::exchange(last, rank) != rank)
          late += (late.empty() ? "" : ", ") +
                  (rank < 0 ? "all_reduce of " + std::string(transport_.name())
                            : transport_.describe(rank));
      fail(fmt::format("gave up after {:.2f} s waiting for {}, which has not joined",
                       seconds(options_.timeout), late));
    }
    transport_.wait(std::min(kSlice, deadline_.remaining()));
  }

  void check(int rank, const Hello& theirs) const {
    const std::string who = transport_.describe(rank);
    if (theirs.magic != kMagic || theirs.version != kVersion)
      fail(
          fmt::format("{} speaks another version of the protocol (its {:x}.{}, this one's {:x}.{})",
                      who, theirs.magic, theirs.version, kMagic, kVersion));
    if (theirs.generation != mine_.generation)
      fail(fmt::format("{} is in generation {}", who, theirs.generation));
    if (theirs.size != mine_.size || theirs.rank != static_cast<std::uint32_t>(rank))
      fail(fmt::format("{} joins as rank {} of {}, not as rank {} of {}", who, theirs.rank,
                       theirs.size, rank, mine_.size));
    if (theirs.exact != mine_.exact)
      fail(
          fmt::format("{} has exact = {}, this rank {}", who, theirs.exact != 0, mine_.exact != 0));
    if (theirs.has_key != mine_.has_key)
      fail(fmt::format("{} has {} key for this job, this rank has {}", who,
                       theirs.has_key != 0 ? "a" : "no", mine_.has_key != 0 ? "one" : "none"));
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw CommError(fmt::format("rank {} cannot join generation {}: {}", transport_.rank(),
                                options_.generation, what));
  }

  RemoteLink& link_;
  Transport& transport_;
  const GroupOptions& options_;
  const Deadline deadline_;
  std::string members_;
  Hello mine_;
};

}  // namespace

void join_remote(RemoteLink& link, const GroupOptions& options) { Join(link, options).run(); }

}  // namespace lockstep
