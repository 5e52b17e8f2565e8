#include "lockstep/collective/direct_reduction.h"

#include <algorithm>
#include <numeric>

#include "lockstep/collective/kernels.h"

namespace lockstep {
namespace {

constexpr std::size_t kWindow = 4;  // pieces
// As much as TCP hands down at once, whole segments of 1448 or 8948 bytes in 64 KB, with UCX's
// header. Messages a little longer than that end in a packet of a few bytes, and are twice the
// work; shorter pieces would begin sooner on slow links.
constexpr std::size_t kMostPiece = 62592, kLeastPiece = 4096;
constexpr std::size_t kScratch = 32 << 20;  // where there are many contributions, pieces are small

}  // namespace

DirectReduction::DirectReduction(RemoteMeeting& meeting, Reducer& reducer,
                                 std::vector<std::byte>& scratch, DirectPlan plan, int rank)
    : meeting_(meeting),
      reducer_(reducer),
      scratch_(scratch),
      plan_(std::move(plan)),
      rank_(rank),
      element_(size_of(plan_.dtype)),
      begins_(plan_.chunks.size() + 1),
      combine_(plan_.tree.plan),
      peers_(plan_.chunks.size()) {
  const auto& contributions = plan_.tree.contributions;
  std::partial_sum(contributions.begin(), contributions.end(), begins_.begin() + 1);
  for (CombineStep& step : combine_.steps)
    if (step.kind == CombineStep::Kind::push)
      step = {.rank = static_cast<int>(begins_[step.rank]) + step.slot};
  const std::size_t all = begins_.back();
  const std::size_t most = kScratch / kWindow / (all + 1) / kLeastPiece * kLeastPiece;
  piece_ = std::clamp(most, kLeastPiece, kMostPiece) / element_;
  for (std::size_t other = 0; other < peers_.size(); ++other) {
    Peer& peer = peers_[other];
    peer.pieces = (plan_.chunks[other].size() + piece_ - 1) / piece_;
    peer.out.each = contributions[rank_];
    peer.in.each = contributions[other];
  }
  // Peers of a carrier need places, too.
  const std::size_t used = plan_.contribute
                               ? kWindow * (all + 1 + peers_.size() * (contributions[rank_] + 1))
                               : std::min(peers_[rank_].pieces, kWindow) * (all + 1);
  scratch_.resize(std::max(scratch_.size(), used * piece_ * element_));
  slots_.resize(all);
}

Slice DirectReduction::piece(int owner, std::size_t number) const {
  const Slice chunk = plan_.chunks[owner];
  const std::size_t first = chunk.first + number * piece_;
  return {first, std::min(first + piece_, chunk.last)};
}

std::byte* DirectReduction::place(std::size_t number, std::size_t contribution) {
  const std::size_t index = number % kWindow * (slots_.size() + 1) + contribution;
  return scratch_.data() + index * piece_ * element_;
}

std::byte* DirectReduction::place_with(int rank, std::size_t number, std::size_t contribution) {
  const std::size_t each = plan_.tree.contributions[rank_] + 1;
  const std::size_t index =
      kWindow * (slots_.size() + 1) + (rank * kWindow + number % kWindow) * each + contribution;
  return scratch_.data() + index * piece_ * element_;
}

bool DirectReduction::drain(Flow& flow) {
  const std::size_t before = flow.ends;
  for (; !flow.open.empty() && meeting_.done(flow.open.front()); ++flow.ends) flow.open.pop_front();
  if (flow.ends == before) return false;
  flow.ended = flow.ends / flow.each;
  return true;
}

bool DirectReduction::advance_with(int rank) {
  Peer& peer = peers_[rank];
  const std::size_t own_pieces = peers_[rank_].pieces;
  bool moved = false;
  if (peer.in.each != 0)
    for (; peer.in.begun < std::min(own_pieces, reduced_ + kWindow); ++peer.in.begun, moved = true)
      for (std::size_t slot = begins_[rank]; slot < begins_[rank + 1]; ++slot)
        peer.in.open.push_back(
            meeting_.receive(rank, RemoteMeeting::kData,
                             {place(peer.in.begun, slot), bytes_of(piece(rank_, peer.in.begun))}));
  moved |= drain(peer.in);
  // Who sends as much as it has had does not flood anybody.
  const bool has_all = peer.in.each == 0 || peer.in.ended == own_pieces;
  const std::size_t most = has_all ? peer.pieces : std::min(peer.pieces, peer.in.ended + kWindow);
  if (peer.out.each != 0)
    for (;
         peer.out.begun < most && (!plan_.contribute || peer.out.begun < peer.out.ended + kWindow);
         ++peer.out.begun, moved = true)
      begin_out(rank);
  moved |= drain(peer.out);
  // A sum may take the place of the contribution, once that has left.
  const std::size_t left = peer.out.each == 0 ? peer.pieces : peer.out.ended;
  const auto place_of_sum = [&](std::size_t number) {
    return plan_.sums != nullptr ? plan_.sums + piece(rank, number).first * element_
                                 : place_with(rank, number, peer.out.each);
  };
  if (gets_sums())
    for (; peer.sums_in.begun < std::min(left, peer.delivered + kWindow);
         ++peer.sums_in.begun, moved = true)
      peer.sums_in.open.push_back(meeting_.receive(
          rank, RemoteMeeting::kSums,
          {place_of_sum(peer.sums_in.begun), bytes_of(piece(rank, peer.sums_in.begun))}));
  moved |= drain(peer.sums_in);
  for (; peer.delivered < peer.sums_in.ended; ++peer.delivered)
    if (plan_.deliver) plan_.deliver(piece(rank, peer.delivered), place_of_sum(peer.delivered));
  moved |= drain(peer.sums_out);
  return moved;
}

void DirectReduction::begin_out(int rank) {
  Flow& out = peers_[rank].out;
  const Slice part = piece(rank, out.begun);
  const std::byte* from = plan_.slots.data() + part.first * element_;
  std::size_t stride = plan_.slot_bytes;
  if (plan_.contribute) {
    std::byte* const to = place_with(rank, out.begun, 0);
    stride = piece_ * element_;
    plan_.contribute(part, to, stride);
    from = to;
  }
  for (std::size_t slot = 0; slot < out.each; ++slot)
    out.open.push_back(
        meeting_.send(rank, RemoteMeeting::kData, {from + slot * stride, bytes_of(part)}));
}

bool DirectReduction::reduce_next() {
  if (reduced_ == peers_[rank_].pieces) return false;
  const auto size = static_cast<int>(peers_.size());
  for (int rank = 0; rank < size; ++rank) {
    const Peer& peer = peers_[rank];
    if (rank == rank_) continue;
    if (peer.in.each != 0 && peer.in.ended <= reduced_) return false;
    if (plan_.own_sum == nullptr && peer.sums_out.open.size() >= kWindow) return false;
  }
  const Slice part = piece(rank_, reduced_);
  if (plan_.contribute) plan_.contribute(part, place(reduced_, begins_[rank_]), piece_ * element_);
  for (int rank = 0; rank < size; ++rank)
    for (std::size_t slot = begins_[rank]; slot < begins_[rank + 1]; ++slot)
      slots_[slot] = rank == rank_ && !plan_.contribute
                         ? plan_.slots.data() + (slot - begins_[rank]) * plan_.slot_bytes +
                               part.first * element_
                         : place(reduced_, slot);
  std::byte* const sum = plan_.own_sum == nullptr ? place(reduced_, slots_.size())
                                                  : plan_.own_sum + reduced_ * piece_ * element_;
  const ReduceJob job{.plan = combine_,
                      .dtype = plan_.dtype,
                      .reduction = plan_.reduction,
                      .round_once = plan_.round_once,
                      .slot_bytes = 0};
  reducer_.run(job, slots_, std::span(&sum, 1), 0, part.size());
  if (plan_.divisor != 1) kernels().divide(sum, plan_.dtype, plan_.divisor, part.size());
  ++reduced_;
  for (int i = 1; i < size; ++i) {
    const int to = (rank_ + i) % size;
    if (plan_.to == DirectPlan::kEverybody || plan_.to == to)
      peers_[to].sums_out.open.push_back(
          meeting_.send(to, RemoteMeeting::kSums, {sum, bytes_of(part)}));
  }
  if (plan_.deliver) plan_.deliver(part, sum);
  return true;
}

bool DirectReduction::advance() {
  bool moved = false;
  const auto size = static_cast<int>(peers_.size());
  for (int i = 1; i < size; ++i) moved |= advance_with((rank_ + i) % size);
  return reduce_next() || moved;
}

bool DirectReduction::waits_for(int rank) const {
  const Peer& peer = peers_[rank];
  return rank != rank_ &&
         ((peer.in.each != 0 && peer.in.ended < peers_[rank_].pieces) ||
          (peer.out.each != 0 && peer.out.ended < peer.pieces) ||
          (gets_sums() && peer.delivered < peer.pieces) || !peer.sums_out.open.empty());
}

bool DirectReduction::is_done() const {
  if (reduced_ < peers_[rank_].pieces) return false;
  for (int rank = 0; rank < static_cast<int>(peers_.size()); ++rank)
    if (waits_for(rank)) return false;
  return true;
}

}  // namespace lockstep
