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

void store(CallRecord& record, const CallWords& words) {
  for (std::size_t i = 0; i < words.size(); ++i)
    record.words[i].store(words[i], std::memory_order_relaxed);
}

// Acquires, so that a look at whether the record still counts comes after.
CallWords load(const CallRecord& record) {
  CallWords words;
  for (std::size_t i = 0; i < words.size(); ++i)
    words[i] = record.words[i].load(std::memory_order_acquire);
  return words;
}

bool is_message(const Call& call) {
  return call.operation == Operation::send || call.operation == Operation::recv;
}

// ControlBlock::message_turn of message `number` with `peer`.
std::uint64_t turn_of(int peer, std::uint64_t number) {
  return static_cast<std::uint64_t>(peer + 1) << 48 | number;
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
      messages_(size_),
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
  mine.message_turn.store(0);
  mine.joined.store(generation_ + 1);
}

Rendezvous::~Rendezvous() {
  block(rank_).left.store(generation_ + 1);
  ring(door(rank_).bell);
}

void Rendezvous::open(Call& call, std::uint64_t sequence, const CallOptions& options) {
  check_open();
  began_ = Clock::now();
  const Clock::duration timeout = options.timeout.value_or(timeout_);
  deadline_ = timeout < kForever ? Deadline::at(began_ + timeout) : Deadline::never();
  call.tag = options.tag;
  call.sequence = sequence;
  call.generation = generation_;
  call.started_at_ns = nanoseconds_of(began_);
  call_ = std::move(call);
  check_ended();
}

void Rendezvous::announce() {
  if (door(rank_).waiters.load(std::memory_order_seq_cst) != 0) ring(door(rank_).bell);
}

const std::vector<CallWords>& Rendezvous::begin(Call call, const CallOptions& options) {
  open(call, next_sequence_, options);
  ++next_sequence_;

  calls_[rank_] = pack(call_);
  store(block(rank_).calls[call_.sequence % 2], calls_[rank_]);
  record_begin(calls_[rank_]);
  meet();
  bool same = true;
  for (int other = 0; other < size_; ++other) {
    if (other == rank_) continue;
    calls_[other] = load(block(other).calls[call_.sequence % 2]);
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
  announce();
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
  count(Clock::now(), bytes);
  block(rank_).operations.store(next_sequence_, std::memory_order_release);
}

void Rendezvous::count(Clock::time_point now, std::uint64_t bytes) {
  ++statistics_.operations;
  statistics_.bytes += bytes;
  statistics_.total += now - began_;
  block(rank_).completed_at_ns.store(nanoseconds_of(now), std::memory_order_relaxed);
  record_end(now, OperationState::done);
}

void Rendezvous::record_begin(const CallWords& call) {
  waited_before_ = statistics_.waiting;
  recorder_.begin(call, call_.tag);
}

void Rendezvous::record_end(Clock::time_point now, OperationState state) {
  if (recorder_.end(nanoseconds_of(now), statistics_.waiting - waited_before_, state) &&
      on_records_)
    on_records_();
}

template <typename Done>
void Rendezvous::wait_for_peer(int peer, Done&& done) {
  const auto start = Clock::now();
  if (may_spin_)
    while (!done() && Clock::now() - start < kSpin) pause_briefly();
  if (!done()) {
    ControlBlock& other = door(peer);
    other.waiters.fetch_add(1, std::memory_order_seq_cst);
    try {
      auto looked_at_process = start;
      for (;;) {
        const std::uint32_t bell = other.bell.load(std::memory_order_seq_cst);
        if (done()) break;
        const auto now = Clock::now();
        const bool look = now - looked_at_process >= kSlice / 2;
        if (look) looked_at_process = now;
        check_ended();
        check_gone(peer, look, done);
        if (deadline_.expired(now))
          fail(fmt::format("gave up after {:.2f} s waiting for rank {}, {}", seconds(now - began_),
                           peer, last_seen(peer)));
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

CallWords Rendezvous::begin_message(int peer, Call call, const CallOptions& options) {
  open(call, messages_[peer], options);
  const std::uint64_t number = messages_[peer]++;
  const CallWords mine = pack(call_);
  ControlBlock& own = block(rank_);
  const ControlBlock& other = block(peer);
  const bool sends = call_.operation == Operation::send;
  record_begin(mine);
  store(own.message, mine);
  own.message_staged.store(1);
  own.message_taken.store(0);
  own.message_turn.store(turn_of(peer, number), std::memory_order_seq_cst);
  announce();
  const auto is_there = [&] { return other.message_turn.load() == turn_of(rank_, number); };
  // A receiver that has taken all may be in another call by now.
  wait_for_peer(peer, [&] { return is_there() || (sends && own.message_taken.load() != 0); });
  const CallWords theirs = load(other.message);
  if (!is_there() && sends) return mine;
  if (!same_message(mine, theirs))
    fail(fmt::format("the calls of two ranks differ: rank {} called {}, rank {} called {}",
                     std::min(rank_, peer), describe(unpack(rank_ < peer ? mine : theirs)),
                     std::max(rank_, peer), describe(unpack(rank_ < peer ? theirs : mine))));
  return sends ? mine : theirs;
}

void Rendezvous::set_staged(std::uint64_t chunks) {
  block(rank_).message_staged.store(chunks, std::memory_order_seq_cst);
  announce();
}

void Rendezvous::await_taken(int peer, std::uint64_t chunks) {
  wait_for_peer(peer, [&] { return block(rank_).message_taken.load() >= chunks; });
}

void Rendezvous::await_staged(int peer, std::uint64_t chunks) {
  wait_for_peer(peer, [&] { return block(peer).message_staged.load() >= chunks; });
}

void Rendezvous::set_taken(int peer, std::uint64_t chunks) {
  block(peer).message_taken.store(chunks, std::memory_order_seq_cst);
  announce();
}

void Rendezvous::end_message(std::uint64_t bytes) {
  count(Clock::now(), bytes);
  block(rank_).message_turn.store(0, std::memory_order_seq_cst);
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
    check_gone(other, look_at_processes, [&] { return arrived(other); });
  }
  if (deadline_.expired(now)) fail_deadline();
}

void Rendezvous::check_gone(int rank, bool look_at_process,
                            const std::function<bool()>& has_arrived) {
  const ControlBlock& late = block(rank);
  // Who arrived and then went has done its part: look again at whether it arrived.
  if (late.left.load() == generation_ + 1) {
    if (!has_arrived()) fail(fmt::format("rank {} has left the group, {}", rank, last_seen(rank)));
  } else if (look_at_process && late.joined.load() == generation_ + 1 &&
             late.pid.load() != ::getpid() &&
             process_state(late.pid.load(), late.process_start.load()) == ProcessState::dead) {
    if (!has_arrived()) fail(fmt::format("rank {} died, {}", rank, last_seen(rank)));
  }
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
  const auto look = [&](const CallRecord& record) {
    const Call call = unpack(load(record));
    if (call.generation == generation_ && call.started_at_ns > last.started_at_ns) last = call;
  };
  for (const CallRecord& record : other.calls) look(record);
  look(other.message);
  if (last.started_at_ns == 0) return fmt::format("which has just joined ({})", process);
  const bool finished = is_message(last)
                            ? other.message_turn.load() == 0
                            : other.operations.load(std::memory_order_acquire) > last.sequence;
  const std::int64_t since = finished ? other.completed_at_ns.load() : last.started_at_ns;
  return fmt::format("last seen {} {} {}, {}, {:.2f} s ago ({})", finished ? "after" : "in",
                     is_message(last) ? "message" : "operation", last.sequence, describe(last),
                     static_cast<double>(nanoseconds_of(Clock::now()) - since) * 1e-9, process);
}

std::string Rendezvous::operation_text() const {
  return fmt::format("{}{}rank {}, {} {} of generation {}, {}", members_.name,
                     members_.name.empty() ? "" : ": ", rank_,
                     is_message(call_) ? "message" : "operation", call_.sequence, generation_,
                     describe(call_));
}

}  // namespace lockstep
