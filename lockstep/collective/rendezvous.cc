#include "lockstep/collective/rendezvous.h"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/collective/process_state.h"

namespace lockstep {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr int kGenerationShift = 48;                  // of ControlBlock::phase
constexpr int kFailedRankBits = 16;                   // of Segment::failed_word()
constexpr Clock::duration kSpin = microseconds(50);   // several times what a wake-up costs
constexpr Clock::duration kSlice = milliseconds(50);  // how late a death may be noticed
constexpr Clock::duration kForever = std::chrono::hours(24 * 365);

std::int64_t nanoseconds_of(Clock::time_point when) {
  return std::chrono::duration_cast<nanoseconds>(when.time_since_epoch()).count();
}

int usable_cores() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::string process_text(const ControlBlock& block) {
  const int pid = block.pid.load();
  if (pid == ::getpid()) return fmt::format("pid {}, alive", pid);
  switch (process_state(pid, block.process_start.load())) {
    case ProcessState::running:
      return fmt::format("pid {}, alive", pid);
    case ProcessState::stopped:
      return fmt::format("pid {}, stopped by a signal", pid);
    case ProcessState::dead:
      return fmt::format("pid {}, dead", pid);
  }
  return "";
}

}  // namespace

Members all_members(std::shared_ptr<Segment> segment) {
  Members members;
  for (int rank = 0; rank < segment->ranks(); ++rank) {
    members.node_ranks.push_back(rank);
    members.blocks.push_back(&segment->control(rank));
  }
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
      may_spin_(size_ <= usable_cores()),
      phase_(options.generation << kGenerationShift),
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
  mine.operations.store(0);
  mine.joined.store(generation_ + 1);
}

Rendezvous::~Rendezvous() {
  block(rank_).left.store(generation_ + 1);
  ring(door(rank_).bell);
}

const std::vector<CallWords>& Rendezvous::begin(Call call, const CallOptions& options) {
  check_open();
  began_ = Clock::now();
  const Clock::duration timeout = options.timeout.value_or(timeout_);
  deadline_ = timeout < kForever ? Deadline::at(began_ + timeout) : Deadline::never();
  call.tag = options.tag;
  call.sequence = next_sequence_++;
  call.generation = generation_;
  call.started_at_ns = nanoseconds_of(began_);
  call_ = std::move(call);
  check_ended();

  calls_[rank_] = pack(call_);
  auto& record = block(rank_).calls[call_.sequence % 2];
  for (std::size_t i = 0; i < calls_[rank_].size(); ++i)
    record.words[i].store(calls_[rank_][i], std::memory_order_relaxed);
  waited_before_ = statistics_.waiting;
  recorder_.begin(calls_[rank_], options.tag);
  meet();
  bool same = true;
  for (int other = 0; other < size_; ++other) {
    if (other == rank_) continue;
    const auto& announced = block(other).calls[call_.sequence % 2];
    for (std::size_t i = 0; i < announced.words.size(); ++i)
      calls_[other][i] = announced.words[i].load(std::memory_order_relaxed);
    same &= same_fingerprint(calls_[other], calls_[rank_]);
  }
  if (!same) fail_mismatch();
  return calls_;
}

void Rendezvous::meet() {
  ++phase_;
  ControlBlock& mine = block(rank_);
  // Sequentially consistent, like the waiter's accesses: either we see it waiting or it sees us.
  mine.phase.store(phase_, std::memory_order_seq_cst);
  if (door(rank_).waiters.load(std::memory_order_seq_cst) != 0) ring(door(rank_).bell);
  // From the next rank on, so that not all ranks look at the same one.
  for (int i = 1; i < size_; ++i) {
    const int other = (rank_ + i) % size_;
    if (!arrived(other)) wait_for(other);
    const std::uint64_t generation = block(other).phase.load() >> kGenerationShift;
    if (generation != generation_)
      fail(fmt::format("rank {} is in generation {} already, this group is of generation {}", other,
                       generation, generation_));
  }
}

void Rendezvous::end(std::uint64_t bytes) {
  const auto now = Clock::now();
  ++statistics_.operations;
  statistics_.bytes += bytes;
  statistics_.total += now - began_;
  ControlBlock& mine = block(rank_);
  mine.completed_at_ns.store(nanoseconds_of(now), std::memory_order_relaxed);
  mine.operations.store(statistics_.operations, std::memory_order_release);
  record_end(now, OperationState::done);
}

void Rendezvous::record_end(Clock::time_point now, OperationState state) {
  if (recorder_.end(nanoseconds_of(now), statistics_.waiting - waited_before_, state) &&
      on_records_)
    on_records_();
}

bool Rendezvous::arrived(int rank) const {
  return block(rank).phase.load(std::memory_order_seq_cst) >= phase_;
}

bool Rendezvous::spin_for(int rank) const {
  if (!may_spin_) return false;
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (arrived(rank)) return true;
      pause_briefly();
    }
  } while (Clock::now() < end);
  return false;
}

void Rendezvous::wait_for(int rank) {
  const auto start = Clock::now();
  ControlBlock& other = door(rank);
  if (!spin_for(rank)) {
    other.waiters.fetch_add(1, std::memory_order_seq_cst);
    try {
      auto looked_at_processes = start;
      for (;;) {
        const std::uint32_t bell = other.bell.load(std::memory_order_seq_cst);
        if (arrived(rank)) break;
        const auto now = Clock::now();
        const bool look = now - looked_at_processes >= kSlice / 2;
        if (look) looked_at_processes = now;
        check_ended();
        check_late(now, look);
        sleep_on(other.bell, bell, std::min(kSlice, deadline_.remaining(now)));
      }
    } catch (...) {
      other.waiters.fetch_sub(1);
      throw;
    }
    other.waiters.fetch_sub(1);
  }
  statistics_.waiting += Clock::now() - start;
}

void Rendezvous::check_ended() {
  if (members_.segment->abort_word().load() != 0)
    end_with(fmt::format("{}: the job was aborted: {}", operation_text(),
                         members_.segment->abort_reason()));
  const std::uint64_t failed = members_.failed->load();
  const int failed_rank = static_cast<int>(failed & ((1 << kFailedRankBits) - 1));
  if (failed >> kFailedRankBits == generation_ + 1 && failed_rank < size_)
    end_with(
        fmt::format("rank {} ended the group: {}", failed_rank, block(failed_rank).failure.get()));
}

void Rendezvous::check_late(Clock::time_point now, bool look_at_processes) {
  for (int other = 0; other < size_; ++other) {
    if (other == rank_ || arrived(other)) continue;
    const ControlBlock& late = block(other);
    // Who arrived and then went has done its part: look again at whether it arrived.
    if (late.left.load() == generation_ + 1) {
      if (!arrived(other))
        fail(fmt::format("rank {} has left the group, {}", other, last_seen(other)));
    } else if (look_at_processes && late.joined.load() == generation_ + 1 &&
               late.pid.load() != ::getpid() &&
               process_state(late.pid.load(), late.process_start.load()) == ProcessState::dead) {
      if (!arrived(other)) fail(fmt::format("rank {} died, {}", other, last_seen(other)));
    }
  }
  if (deadline_.expired(now)) fail_deadline();
}

void Rendezvous::check_open() const {
  if (!over_.empty()) throw CommError("this group ended with: " + over_);
}

void Rendezvous::end_with(const std::string& message) {
  over_ = message;
  record_end(Clock::now(), OperationState::failed);
  throw CommError(message);
}

void Rendezvous::fail(const std::string& what) {
  const std::string message = fmt::format("{}: {}", operation_text(), what);
  block(rank_).failure.set(message);
  const std::uint64_t mine =
      (generation_ + 1) << kFailedRankBits | static_cast<std::uint64_t>(rank_);
  auto& word = *members_.failed;
  std::uint64_t seen = word.load();
  while (seen >> kFailedRankBits < generation_ + 1 && !word.compare_exchange_weak(seen, mine)) {
  }
  members_.segment->wake_all();
  end_with(message);
}

void Rendezvous::fail_deadline() {
  std::string late;
  for (int other = 0; other < size_; ++other)
    if (other != rank_ && !arrived(other))
      late += fmt::format("{}rank {}, {}", late.empty() ? "" : "; ", other, last_seen(other));
  fail(fmt::format("gave up after {:.2f} s waiting for {}", seconds(Clock::now() - began_), late));
}

void Rendezvous::fail_mismatch() {
  std::vector<std::pair<std::string, std::vector<int>>> groups;  // call, who made it
  for (int rank = 0; rank < size_; ++rank) {
    std::string text = describe(unpack(calls_[rank]));
    const auto found = std::find_if(groups.begin(), groups.end(),
                                    [&](const auto& group) { return group.first == text; });
    if (found != groups.end())
      found->second.push_back(rank);
    else
      groups.push_back({std::move(text), {rank}});
  }
  std::string text;
  for (const auto& [call, ranks] : groups)
    text += fmt::format("{}{} {} called {}", text.empty() ? "" : ", ",
                        ranks.size() == 1 ? "rank" : "ranks", fmt::join(ranks, " and "), call);
  fail("the ranks' calls differ: " + text);
}

std::string Rendezvous::last_seen(int rank) const {
  const ControlBlock& other = block(rank);
  const std::uint64_t joined = other.joined.load();
  if (joined == 0) return "which has never joined";
  const std::string process = process_text(other);
  if (joined != generation_ + 1)
    return fmt::format("which is in generation {} ({})", joined - 1, process);
  Call last;
  for (const CallRecord& record : other.calls) {
    CallWords words;
    for (std::size_t i = 0; i < words.size(); ++i) words[i] = record.words[i].load();
    Call call = unpack(words);
    if (call.generation == generation_ && call.started_at_ns != 0 &&
        (last.started_at_ns == 0 || call.sequence > last.sequence))
      last = std::move(call);
  }
  if (last.started_at_ns == 0) return fmt::format("which has just joined ({})", process);
  const bool finished = other.operations.load(std::memory_order_acquire) > last.sequence;
  const std::int64_t since = finished ? other.completed_at_ns.load() : last.started_at_ns;
  return fmt::format("last seen {} operation {}, {}, {:.2f} s ago ({})", finished ? "after" : "in",
                     last.sequence, describe(last),
                     static_cast<double>(nanoseconds_of(Clock::now()) - since) * 1e-9, process);
}

std::string Rendezvous::operation_text() const {
  return fmt::format("{}{}rank {}, operation {} of generation {}, {}", members_.name,
                     members_.name.empty() ? "" : ": ", rank_, call_.sequence, generation_,
                     describe(call_));
}

}  // namespace lockstep
