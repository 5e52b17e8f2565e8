// The direct plan of a reduction over messages: everyone sends each rank its chunk, who adds what
// all sent in canonical order and sends the sum to everyone: 2 (p - 1) / p of the data a rank, in
// the canonical association for any number of ranks. In pieces, so that adding and sending
// overlap; a few are under way at a time.
//
// A state machine that is advanced until it is done. One thread, within one operation of its
// meeting; private to this layer.
#pragma once

#include <deque>
#include <functional>
#include <vector>

#include "lockstep/collective/reduce.h"
#include "lockstep/collective/remote_meeting.h"

namespace lockstep {

struct DirectPlan {
  static constexpr int kEverybody = -1, kNobody = -2;

  const Tree& tree;  // who contributes what
  Dtype dtype;
  Reduction reduction;
  bool round_once;                        // as ReduceJob's
  std::span<const std::byte> slots = {};  // this rank's contributions
  std::size_t slot_bytes = 0;             // from one to the next
  std::vector<Slice> chunks = {};         // by owner
  std::byte* own_sum = nullptr;  // where that of this rank's chunk goes; nullptr: it only travels
  std::byte* sums = nullptr;     // where those that come go, by their place in a slot
  int to = kEverybody;           // who gets the sums, beside their owners
  int divisor = 1;               // of the sums
  // Of who carries data of several. Writes this rank's contributions to these elements, `stride`
  // bytes from one to the next: in place of `slots`.
  std::function<void(Slice, std::byte* to, std::size_t stride)> contribute = {};
  // Takes each sum that this rank has; `sums` may be nullptr then.
  std::function<void(Slice, const std::byte* sum)> deliver = {};
};

class DirectReduction {
 public:
  // `scratch` and what the plan names must stay until it is done.
  DirectReduction(RemoteMeeting& meeting, Reducer& reducer, std::vector<std::byte>& scratch,
                  DirectPlan plan, int rank);
  // Whether anything moved.
  bool advance();
  bool is_done() const;
  bool waits_for(int rank) const;

 private:
  using Ticket = RemoteMeeting::Ticket;
  // Tickets of messages in order, `each` of them a piece.
  struct Flow {
    std::size_t each = 1;
    std::size_t begun = 0, ended = 0;  // pieces
    std::size_t ends = 0;              // messages
    std::deque<Ticket> open = {};
  };
  struct Peer {
    std::size_t pieces = 0;  // of its chunk
    Flow out, in;            // contributions to its chunk, to this rank's
    Flow sums_out, sums_in;
    std::size_t delivered = 0;  // pieces of sums
  };

  Slice piece(int owner, std::size_t number) const;
  std::size_t bytes_of(Slice slice) const { return slice.size() * element_; }
  // Where contributions to this rank's chunk lie, and behind them the sum.
  std::byte* place(std::size_t number, std::size_t contribution);
  // The same of what is contributed to another rank's, and the sum that comes from there.
  std::byte* place_with(int rank, std::size_t number, std::size_t contribution);
  bool gets_sums() const { return plan_.to == DirectPlan::kEverybody || plan_.to == rank_; }
  void begin_out(int rank);
  bool drain(Flow& flow);
  bool advance_with(int rank);
  bool reduce_next();

  RemoteMeeting& meeting_;
  Reducer& reducer_;
  std::vector<std::byte>& scratch_;
  const DirectPlan plan_;
  const int rank_;
  const std::size_t element_;
  std::vector<std::size_t> begins_;  // of a rank's contributions among all
  CombinePlan combine_;              // the tree's, of contributions by number
  std::size_t piece_ = 0;            // elements
  std::size_t reduced_ = 0;          // pieces of this rank's chunk
  std::vector<Peer> peers_;          // by rank
  std::vector<const std::byte*> slots_;
};

}  // namespace lockstep
