// How the ranks of one node meet: each announces a call in a cache line of its control block, waits
// for all the others' lines, compares them, and knows that every earlier write of theirs is
// visible. A few bytes of data travel in the announcement itself. Owned by one group and used by
// one thread at a time.
//
// Waiting: spins briefly when every rank can have a core of its own, then sleeps on the late rank's
// bell in slices, after each of which it looks for an abort, a failed group, a dead process and the
// deadline.
//
// Who announces looks afterwards whether somebody sleeps. Between that store and that load a fence
// belongs, which would wait for the store to reach the other core, on every call. So, where all
// ranks can, the one who goes to sleep pays instead: membarrier(2) is a fence on everybody's side.
//
// Files: rendezvous.cc (meeting), rendezvous_message.cc (send, recv), rendezvous_error.cc (whom a
// wait can end with, and its words).
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/collective/call.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/operation_record.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

// Who meets, by rank in the group. The segment's own control blocks are those of the group of all;
// a sub-group has others, elsewhere in the segment.
struct Members {
  std::shared_ptr<Segment> segment;
  std::vector<int> node_ranks;         // whose arena and whose bell: seats in the segment
  std::vector<int> crowd;              // the seats of all who want a core, other groups' too
  std::vector<ControlBlock*> blocks;   // a sub-group's own
  std::atomic<std::uint64_t>* failed;  // as Segment::failed_word()
  std::string name;                    // for messages; "" for the group of all
};
// The group of all: who sits there, in the order of their ranks. None: everybody.
Members all_members(std::shared_ptr<Segment> segment, std::span<const int> seats = {});

class Rendezvous {
 public:
  // Throws CommError if this rank has taken part in this generation or a later one.
  Rendezvous(Members members, int rank, const GroupOptions& options);
  ~Rendezvous();  // tells the others that this rank is gone
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;

  // Opens an operation: announces `call` with `payload` (at most kPayloadBytes; its size is the
  // same on all ranks), waits until all ranks have announced theirs, compares. Returns everybody's,
  // by rank; valid until the next call. Throws CommError.
  const std::vector<CallWords>& begin(const Call& call, const CallOptions& options,
                                      std::span<const std::byte> payload = {});
  // Of the next begin(). Memory that operation n's readers are done with when all have begun n + 1
  // may come from two places in turn.
  std::uint64_t next_sequence() const { return next_sequence_; }
  // Once all have joined: how all of them wait and ring from now on. Ranks of other groups need
  // cores, too.
  void agree_on_waiting();
  // Meets again within the operation: what each rank wrote before is visible to all after.
  void meet();
  void end(std::uint64_t bytes);
  bool may_spin() const { return may_spin_; }
  const std::vector<int>& crowd() const { return members_.crowd; }
  // A rank's copy of operation `sequence`'s input.
  std::byte* input_of(int rank, std::uint64_t sequence) const {
    return block(rank).inputs[sequence % 2].bytes;
  }

  // A message between this rank and `peer` alone (call.operation: send or recv): announces it and
  // waits for the peer's, compares. Returns the sender's call. The first chunk is staged already.
  CallWords begin_message(int peer, const Call& call, const CallOptions& options);
  // By the sender: chunks that can be read; returns once the peer has taken so many.
  void set_staged(std::uint64_t chunks);
  void await_taken(int peer, std::uint64_t chunks);
  // By the receiver.
  void await_staged(int peer, std::uint64_t chunks);
  void set_taken(int peer, std::uint64_t chunks);
  void end_message(std::uint64_t bytes);

  // Ends the group on all ranks, with this message. Throws CommError.
  [[noreturn]] void fail(const std::string& what);
  // Throws once the group is over.
  void check_open() const;

  const GroupStatistics& statistics() const { return statistics_; }

 private:
  // Without a clock or a pause: what a meeting takes of ranks that come at the same time.
  static constexpr int kEagerLooks = 100;

  ControlBlock& block(int rank) const { return *members_.blocks[rank]; }
  // The block whose bell a rank rings for all its groups, so that whoever wakes the segment's
  // ranks wakes those of sub-groups too.
  ControlBlock& door(int rank) const { return *doors_[rank]; }
  // At the meeting that is under way.
  std::uint64_t seen(int rank) const {
    ControlBlock& theirs = block(rank);
    const auto& word = in_call_ ? line_of(theirs).words[0] : theirs.phase;
    return word.load(std::memory_order_acquire);
  }
  // Where the call that is open is announced.
  CallLine& line_of(ControlBlock& block) const {
    return call_.sequence == 0 ? block.joins[generation_ % 2] : block.calls[call_.sequence % 2];
  }
  bool arrived(int rank) const { return seen(rank) >= expected_; }
  void open(const Call& call, std::uint64_t sequence, const CallOptions& options);
  // After the announcement, while the others' are on their way.
  void record_begin(const CallWords& call, const CallOptions& options);
  void record_end(Clock::time_point now, OperationState state);
  Clock::time_point ended();  // now, as cheaply as it can be told
  // Makes those look again who wait for this rank.
  void announce();
  void await_all();
  // Until done(). Alone: `peer` is the only one that can keep us waiting.
  template <typename Done>
  void await(int peer, bool alone, const Done& done) {
    for (int look = may_spin_ ? kEagerLooks : 1; look > 0; --look)
      if (done()) return;
    await_slowly(peer, alone, std::cref(done));
  }
  void await_slowly(int peer, bool alone, const std::function<bool()>& done);
  bool spin(const std::function<bool()>& done) const;
  void sleep_until(int peer, bool alone, const std::function<bool()>& done);
  // Throws CommError if `peer`, whose message we wait for, will not send it, or not in time.
  void check_peer(int peer, Clock::time_point now, bool look_at_process,
                  const std::function<bool()>& has_arrived);
  // Throws CommError if the rank has left or died before it arrived.
  void check_gone(int rank, bool look_at_process, const std::function<bool()>& has_arrived);
  // Throws CommError if the job was aborted or another rank ended the group.
  void check_ended();
  // Throws CommError if a rank that we wait for will not come any more, or not in time.
  // `look_at_processes`: costs system calls.
  void check_late(Clock::time_point now, bool look_at_processes);
  [[noreturn]] void fail_mismatch();
  [[noreturn]] void end_with(const std::string& message);
  std::string quote(int rank, const CallWords& words) const;
  std::string last_seen(int rank) const;
  std::string operation_text() const;
  static std::string process_text(const ControlBlock& block);  // "pid 7, alive"

  const Members members_;
  std::vector<ControlBlock*> doors_;
  const int rank_;
  const int size_;
  const std::uint64_t generation_;
  const Clock::duration timeout_;
  bool may_spin_;
  bool sleepers_fence_ = false;  // so that announcers need not
  std::uint64_t phase_;
  std::uint64_t next_sequence_ = 0;
  std::vector<std::uint64_t> messages_;  // with each rank

  // The meeting under way: which of a rank's words says that it arrived, and from what value on.
  bool in_call_ = false;
  std::uint64_t expected_ = 0;

  Call call_;  // the operation that is open or was last
  Clock::time_point began_{};
  std::uint64_t began_ticks_ = 0;
  const Clock::time_point made_;  // when this was made, by both clocks
  const std::uint64_t made_ticks_;
  double ns_per_tick_ = 0;  // 0: not known yet
  Deadline deadline_ = Deadline::never();
  std::vector<CallWords> calls_;
  std::string over_;  // the message that ended the group
  GroupStatistics statistics_;
  OperationRecorder recorder_;
  Clock::duration waited_before_{};  // statistics_.waiting when the operation began
  const std::function<void()> on_records_;
};

}  // namespace lockstep
