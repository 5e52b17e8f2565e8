#include "lockstep/collective/rendezvous.h"

#include <fmt/format.h>
#include <linux/membarrier.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/collective/process_state.h"

namespace lockstep {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr Clock::duration kSpin = microseconds(50);   // several times what a wake-up costs
constexpr Clock::duration kSlice = milliseconds(50);  // how late a death may be noticed
constexpr Clock::duration kForever = std::chrono::hours(24 * 365);

using Cores = std::array<std::uint64_t, 16>;  // as in ControlBlock

Cores usable_cores() {
  Cores cores{};
  cpu_set_t set;
  static_assert(sizeof(set) == sizeof(cores));
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) std::memcpy(&cores, &set, sizeof(cores));
  return cores;
}

int number_of(const Cores& cores) {
  int sum = 0;
  for (const std::uint64_t word : cores) sum += std::popcount(word);
  return sum;
}

int membarrier(int command) { return static_cast<int>(::syscall(SYS_membarrier, command, 0, 0)); }

// A third of what the clock costs, which a call of a tenth of a microsecond feels. 0: there is
// none.
std::uint64_t ticks() {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#else
  return 0;
#endif
}
constexpr std::uint64_t kFewTicks = 1 << 18;  // beyond, the rate is not exact enough
constexpr Clock::duration kCalibration = milliseconds(10);

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Word 0 last: who sees it sees the others.
void publish(CallLine& line, const CallWords& words) {
  for (std::size_t i = 1; i < words.size(); ++i)
    line.words[i].store(words[i], std::memory_order_relaxed);
  line.words[0].store(words[0], std::memory_order_release);
}

}  // namespace

Members all_members(std::shared_ptr<Segment> segment, std::span<const int> seats) {
  Members members;
  members.node_ranks.assign(seats.begin(), seats.end());
  for (int seat = 0; seats.empty() && seat < segment->seats(); ++seat)
    members.node_ranks.push_back(seat);
  for (const int seat : members.node_ranks) members.blocks.push_back(&segment->control(seat));
  members.crowd = members.node_ranks;
  members.failed = &segment->failed_word();
  members.segment = std::move(segment);
  return members;
}

Rendezvous::Rendezvous(Members members, int rank, const GroupOptions& options)
    : members_(std::move(members)),
      rank_(rank),
      size_(static_cast<int>(members_.blocks.size())),
      generation_(options.generation),
      timeout_(options.timeout),
      may_spin_(static_cast<int>(members_.crowd.size()) <= number_of(usable_cores())),
      phase_(options.generation << kGenerationShift),
      messages_(size_),
      made_(Clock::now()),
      made_ticks_(ticks()),
      calls_(size_),
      recorder_(members_.segment->recorder(members_.node_ranks.at(rank)), members_.name),
      on_records_(options.on_records) {
  LOCKSTEP_CHECK(rank >= 0 && rank < size_);
  for (const int node_rank : members_.node_ranks)
    doors_.push_back(&members_.segment->control(node_rank));
  if (generation_ >= (1 << (64 - kGenerationShift)) - 1)
    throw ConfigError(fmt::format("generation {} is too large", generation_));
  ControlBlock& mine = block(rank_);
  const std::uint64_t joined = mine.joined.load();
  if (joined > generation_)
    throw CommError(
        fmt::format("rank {} cannot join generation {}: it already took part in generation {} ({})",
                    rank_, generation_, joined - 1, process_text(mine)));
  mine.pid.store(::getpid());
  mine.process_start.store(process_start_time(::getpid()));
  const Cores cores = usable_cores();
  std::ranges::copy(cores, mine.cores.begin());
  mine.expedites.store(membarrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED) == 0);
  mine.message_turn.store(0);
  mine.joined.store(generation_ + 1);
}

Rendezvous::~Rendezvous() {
  block(rank_).left.store(generation_ + 1);
  ring(door(rank_).bell);
}

void Rendezvous::agree_on_waiting() {
  Cores all{};
  sleepers_fence_ = true;
  for (const int seat : members_.crowd) {
    const ControlBlock& theirs = members_.segment->control(seat);
    for (std::size_t i = 0; i < all.size(); ++i) all[i] |= theirs.cores[i].load();
    sleepers_fence_ &= theirs.expedites.load() != 0;
  }
  may_spin_ = static_cast<int>(members_.crowd.size()) <= number_of(all);
  sleepers_fence_ &= may_spin_;  // else nearly everybody sleeps, and a fence is cheaper
}

void Rendezvous::open(const Call& call, std::uint64_t sequence, const CallOptions& options) {
  check_open();
  call_ = call;
  call_.tag = options.tag;
  call_.sequence = sequence;
  call_.generation = generation_;
  began_ = {};
  check_ended();
  recorder_.claim();
}

void Rendezvous::record_begin(const CallWords& call, const CallOptions& options) {
  began_ = Clock::now();
  began_ticks_ = ticks();
  const Clock::duration timeout = options.timeout.value_or(timeout_);
  deadline_ = timeout < kForever ? Deadline::at(began_ + timeout) : Deadline::never();
  waited_before_ = statistics_.waiting;
  recorder_.begin(call, call_.tag, nanoseconds_of(began_));
}

void Rendezvous::announce() {
  ControlBlock& mine = door(rank_);
  std::uint32_t waiting = 0;
  if (sleepers_fence_) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    waiting = mine.waiting.load(std::memory_order_relaxed);
  } else {
    waiting = mine.waiting.fetch_add(0, std::memory_order_seq_cst);  // a fence and a load
  }
  if (waiting == 0) return;
  mine.waiting.store(0, std::memory_order_seq_cst);  // who still waits says so again
  ring(mine.bell);
}

const std::vector<CallWords>& Rendezvous::begin(const Call& call, const CallOptions& options,
                                                std::span<const std::byte> payload) {
  LOCKSTEP_CHECK(payload.size() <= kPayloadBytes);
  open(call, next_sequence_, options);
  ++next_sequence_;
  call_.payload = static_cast<std::uint8_t>(payload.size());
  CallWords& mine = calls_[rank_];
  mine = pack(call_);
  if (!payload.empty()) std::memcpy(&mine[kPayloadWord], payload.data(), payload.size());
  in_call_ = true;
  expected_ = mine[0];
  publish(line_of(block(rank_)), mine);
  announce();
  record_begin(mine, options);
  await_all();
  bool same = true;
  for (int other = 0; other < size_; ++other) {
    if (other == rank_) continue;
    const CallLine& line = line_of(block(other));
    for (std::size_t i = 0; i < mine.size(); ++i)
      calls_[other][i] = line.words[i].load(std::memory_order_relaxed);
    same &= same_fingerprint(calls_[other], mine);
  }
  if (!same) fail_mismatch();
  return calls_;
}

void Rendezvous::meet() {
  in_call_ = false;
  expected_ = ++phase_;
  block(rank_).phase.store(phase_, std::memory_order_release);
  announce();
  await_all();
  // Who gave up meanwhile may have freed what we have just read: its result does not count.
  check_ended();
}

void Rendezvous::await_all() {
  // From the next rank on, so that not all ranks look at the same one.
  for (int i = 1; i < size_; ++i) {
    const int other = (rank_ + i) % size_;
    await(other, false, [&] { return arrived(other); });
    const std::uint64_t generation = seen(other) >> kGenerationShift;
    if (generation != generation_)
      fail(fmt::format("rank {} is in generation {} already, this group is of generation {}", other,
                       generation, generation_));
  }
}

Clock::time_point Rendezvous::ended() {
  const std::uint64_t passed = ticks() - began_ticks_;
  if (passed < kFewTicks && ns_per_tick_ > 0)
    return began_ +
           nanoseconds(static_cast<std::int64_t>(static_cast<double>(passed) * ns_per_tick_));
  const Clock::time_point now = Clock::now();
  const std::uint64_t since_made = ticks() - made_ticks_;
  if (now - made_ > kCalibration && since_made != 0)
    ns_per_tick_ =
        static_cast<double>(nanoseconds(now - made_).count()) / static_cast<double>(since_made);
  return now;
}

void Rendezvous::end(std::uint64_t bytes) {
  const Clock::time_point now = ended();
  ++statistics_.operations;
  statistics_.bytes += bytes;
  statistics_.total += now - began_;
  record_end(now, OperationState::done);
}

void Rendezvous::record_end(Clock::time_point now, OperationState state) {
  if (recorder_.end(nanoseconds_of(now), statistics_.waiting - waited_before_, state) &&
      on_records_)
    on_records_();
}

void Rendezvous::await_slowly(int peer, bool alone, const std::function<bool()>& done) {
  const auto start = Clock::now();
  const auto count = [&] { statistics_.waiting += Clock::now() - start; };
  try {
    if (!spin(done)) sleep_until(peer, alone, done);
  } catch (...) {
    count();
    throw;
  }
  count();
}

bool Rendezvous::spin(const std::function<bool()>& done) const {
  if (!may_spin_) return false;
  const auto end = Clock::now() + kSpin;
  do {
    for (int look = 0; look < 32; ++look) {
      if (done()) return true;
      pause_briefly();
    }
  } while (Clock::now() < end);
  return false;
}

void Rendezvous::sleep_until(int peer, bool alone, const std::function<bool()>& done) {
  ControlBlock& other = door(peer);
  auto looked_at_process = Clock::now();
  for (;;) {
    const std::uint32_t bell = other.bell.load(std::memory_order_seq_cst);
    other.waiting.store(1, std::memory_order_seq_cst);
    if (sleepers_fence_) membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED);
    if (done()) return;
    const auto now = Clock::now();
    const bool look = now - looked_at_process >= kSlice / 2;
    if (look) looked_at_process = now;
    check_ended();
    if (alone)
      check_peer(peer, now, look, done);
    else
      check_late(now, look);
    sleep_on(other.bell, bell, std::min(kSlice, deadline_.remaining(now)));
  }
}

}  // namespace lockstep
