// Whom a wait can end with, and in which words.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/collective/process_state.h"
#include "lockstep/collective/rendezvous.h"
#include "lockstep/memory/generation_board.h"

namespace lockstep {
namespace {

constexpr int kFailedRankBits = 16;  // of Segment::failed_word()
// How long a rank whose call we have seen may take to write it into its flight recorder.
constexpr Clock::duration kRecording = std::chrono::milliseconds(100);

bool is_message(const Call& call) {
  return call.operation == Operation::send || call.operation == Operation::recv;
}

// The newest operation of a rank that `wanted` accepts.
template <typename Wanted>
std::optional<RecordedOperation> newest(Segment& segment, int node_rank, Wanted&& wanted) {
  const auto all = recorded_operations(segment, node_rank);
  const auto found = std::find_if(all.rbegin(), all.rend(), wanted);
  if (found == all.rend()) return std::nullopt;
  return *found;
}

}  // namespace

void Rendezvous::check_ended() {
  if (members_.segment->abort_word().load() != 0)
    end_with(fmt::format("{}: the job was aborted: {}", operation_text(),
                         members_.segment->abort_reason()));
  if (generations_over(*members_.segment) > generation_) {
    const auto newest = newest_generation(*members_.segment);
    end_with(fmt::format("{}: generation {} is over: {}", operation_text(), generation_,
                         newest ? newest->reason : ""));
  }
  const std::uint64_t failed = members_.failed->load();
  const std::uint64_t generation = failed >> kFailedRankBits;
  const int rank = static_cast<int>(failed & ((1 << kFailedRankBits) - 1));
  if (generation <= generation_ || rank >= size_) return;
  end_with(fmt::format(
      "rank {} ended the group{}: {}", rank,
      generation == generation_ + 1 ? "" : fmt::format(" of generation {} already", generation - 1),
      block(rank).failure.get()));
}

void Rendezvous::check_late(Clock::time_point now, bool look_at_processes) {
  for (int other = 0; other < size_; ++other) {
    if (other == rank_ || arrived(other)) continue;
    check_gone(other, look_at_processes, [&] { return arrived(other); });
  }
  if (!deadline_.expired(now)) return;
  std::string late;
  for (int other = 0; other < size_; ++other)
    if (other != rank_ && !arrived(other))
      late += fmt::format("{}rank {}, {}", late.empty() ? "" : "; ", other, last_seen(other));
  if (!late.empty())
    fail(fmt::format("gave up after {:.2f} s waiting for {}", seconds(now - began_), late));
}

void Rendezvous::check_peer(int peer, Clock::time_point now, bool look_at_process,
                            const std::function<bool()>& has_arrived) {
  check_gone(peer, look_at_process, has_arrived);
  // A collective that we have not begun, and that the peer cannot leave without us.
  CallWords theirs;
  for (std::size_t i = 0; i < theirs.size(); ++i)
    theirs[i] = block(peer).calls[next_sequence_ % 2].words[i].load();
  if (theirs[0] == ticket_of(generation_, next_sequence_) && !has_arrived())
    fail(fmt::format("the calls of two ranks differ: rank {} called {}, rank {} called {}", rank_,
                     describe(call_), peer, quote(peer, theirs)));
  if (deadline_.expired(now))
    fail(fmt::format("gave up after {:.2f} s waiting for rank {}, {}", seconds(now - began_), peer,
                     last_seen(peer)));
}

void Rendezvous::check_gone(int rank, bool look_at_process,
                            const std::function<bool()>& has_arrived) {
  const ControlBlock& late = block(rank);
  const ControlBlock& home =
      door(rank);  // where it says who it is, also before it joins this group
  // Who arrived and then went has done its part: look again at whether it arrived.
  const std::uint64_t joined = late.joined.load();
  if (joined > generation_ + 1) {
    if (!has_arrived())
      fail(fmt::format("rank {} is in generation {} already, this group is of generation {} ({})",
                       rank, joined - 1, generation_, process_text(home)));
  } else if (late.left.load() > generation_) {
    if (!has_arrived()) fail(fmt::format("rank {} has left the group, {}", rank, last_seen(rank)));
  } else if (look_at_process && home.joined.load() == generation_ + 1 &&
             home.pid.load() != ::getpid() &&
             process_state(home.pid.load(), home.process_start.load()) == ProcessState::dead) {
    if (!has_arrived()) fail(fmt::format("rank {} died, {}", rank, last_seen(rank)));
  }
}

void Rendezvous::check_open() const {
  if (!over_.empty()) throw CommError("this group ended with: " + over_);
}

void Rendezvous::end_with(const std::string& message) {
  over_ = message;
  const Clock::time_point now = Clock::now();
  if (began_ != Clock::time_point()) statistics_.total += now - began_;
  record_end(now, OperationState::failed);
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

void Rendezvous::fail_mismatch() {
  std::vector<std::string> texts;
  for (int rank = 0; rank < size_; ++rank) texts.push_back(quote(rank, calls_[rank]));
  fail(describe_difference(texts));
}

std::string Rendezvous::process_text(const ControlBlock& block) {
  const int pid = block.pid.load();
  const ProcessState state =
      pid == ::getpid() ? ProcessState::running : process_state(pid, block.process_start.load());
  return fmt::format("pid {}, {}", pid, name_of(state));
}

std::string Rendezvous::quote(int rank, const CallWords& words) const {
  Call call = unpack(words);
  call.tag = call_.tag;
  const Deadline deadline = Deadline::after(rank == rank_ ? Clock::duration::zero() : kRecording);
  while (rank != rank_) {
    const auto recorded =
        newest(*members_.segment, members_.node_ranks[rank], [&](const RecordedOperation& one) {
          return one.call.sequence == call.sequence && one.call.operation == call.operation &&
                 one.call.root == call.root && one.call.generation == generation_ &&
                 one.group == recorder_.group();
        });
    call.tag = recorded ? recorded->call.tag : Tag();
    if (recorded || deadline.expired()) break;
    std::this_thread::yield();
  }
  return describe(call);
}

std::string Rendezvous::last_seen(int rank) const {
  const std::uint64_t joined = block(rank).joined.load();
  const std::string process = process_text(door(rank));
  if (joined == 0)
    return door(rank).joined.load() == 0 ? "which has never joined"
                                         : fmt::format("which has not joined ({})", process);
  if (joined != generation_ + 1)
    return fmt::format("which is in generation {} ({})", joined - 1, process);
  const auto last =
      newest(*members_.segment, members_.node_ranks[rank],
             [&](const RecordedOperation& one) { return one.call.generation == generation_; });
  if (!last) return fmt::format("which has just joined ({})", process);
  const bool open = last->state == OperationState::open;
  const std::int64_t since = open ? last->started_at_ns : last->ended_at_ns;
  const std::string where = last->group == recorder_.group() ? ""
                            : last->group.empty()            ? "the group of all: "
                                                             : last->group + ": ";
  return fmt::format(
      "last seen {} {}{} {}, {}, {:.2f} s ago ({})", open ? "in" : "after", where,
      is_message(last->call) ? "message" : "operation", last->call.sequence, describe(last->call),
      (static_cast<double>(nanoseconds_of(Clock::now())) - static_cast<double>(since)) * 1e-9,
      process);
}

std::string Rendezvous::operation_text() const {
  return fmt::format("{}{}rank {}, {} {} of generation {}, {}", members_.name,
                     members_.name.empty() ? "" : ": ", rank_,
                     is_message(call_) ? "message" : "operation", call_.sequence, generation_,
                     describe(call_));
}

}  // namespace lockstep
