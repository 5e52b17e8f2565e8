#include "lockstep/collective/remote_meeting.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr Clock::duration kForever = std::chrono::hours(24 * 365);
constexpr Clock::duration kLastWords = std::chrono::milliseconds(100);
constexpr Clock::duration kLinger = std::chrono::seconds(1);  // for who still needs our data
constexpr int kMostChannels = 1 << 16;

}  // namespace

RemoteMeeting::RemoteMeeting(std::shared_ptr<RemoteLink> link, std::vector<int> members, int rank,
                             int channel, const GroupOptions& options, std::string name)
    : link_(std::move(link)),
      members_(std::move(members)),
      rank_(rank),
      size_(static_cast<int>(members_.size())),
      channel_(channel),
      name_(std::move(name)),
      generation_(options.generation),
      timeout_(options.timeout),
      is_generation_over_(options.is_over),
      on_records_(options.on_records),
      peers_(size_),
      calls_(size_) {
  if (generation_ >= (1 << (64 - kGenerationShift)) - 1)
    throw ConfigError(fmt::format("generation {} is too large", generation_));
  if (channel_ + kChannels > kMostChannels)
    throw Error("too many groups over one transport: each split() uses some of its channels up");
  link_->next_channel = std::max(link_->next_channel, channel_ + kChannels);
  if (options.recorder != nullptr)
    recorder_.emplace(*options.recorder, name_.empty() ? "across nodes" : name_);
  for (int other = 0; other < size_; ++other) {
    if (other == rank_) continue;
    Peer& peer = peers_[other];
    peer.notice_out = link_->lasting(kNoticeBytes);
    peer.notice = link_->lasting(kNoticeBytes);
    peer.noticing = transport().receive(members_[other], this->channel(kNotices), peer.notice);
    open_mailbox(other, peer.frames, kFrames);
  }
}

RemoteMeeting::~RemoteMeeting() {
  if (!link_->over.empty()) return;
  const bool in_order = over_.empty();
  if (in_order) notify(kLeft, "");
  // Who owns the transport ends it: nobody may need it any more.
  const bool last = link_.use_count() == 1;
  flush_notices(last && in_order ? kLinger : kLastWords, last && in_order);
}

int RemoteMeeting::lane_of(std::size_t bytes) {
  if (bytes > kMostInFrame) return 0;
  int lane = 0;
  while (kLaneBytes[lane] - kHeaderBytes < bytes) ++lane;
  return lane;
}

void RemoteMeeting::open_mailbox(int rank, Mailbox& box, int first) {
  if (std::exchange(box.is_open, true)) return;
  for (auto& out : box.out) out = link_->lasting(kLaneBytes[kLanes - 1]);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int turn = 0; turn < 2; ++turn) {
      auto& buffer = box.lanes[lane].buffers[turn] = link_->lasting(kLaneBytes[lane]);
      box.lanes[lane].tickets[turn] =
          transport().receive(members_[rank], channel(first + lane), buffer);
    }
}

void RemoteMeeting::post(int rank, Mailbox& box, int first, std::span<const std::byte> payload,
                         CallWords words) {
  const unsigned turn = box.sends++ % 2;
  // Of two calls ago: it has arrived long since, or that call would not be over.
  if (auto& before = box.sent[turn])
    await([&] { return transport().done(*before); }, [&](int other) { return other == rank; });
  const std::span<std::byte> frame = box.out[turn];
  std::memcpy(frame.data(), words.data(), sizeof(words));
  std::memcpy(frame.data() + sizeof(words), call_.tag.bytes().data(), Tag::kBytes);
  const bool fits = payload.size() <= kMostInFrame;
  if (fits && !payload.empty())
    std::memcpy(frame.data() + kHeaderBytes, payload.data(), payload.size());
  const int lane = lane_of(payload.size());
  box.sent[turn] =
      transport().send(members_[rank], channel(first + lane), frame.first(kLaneBytes[lane]));
}

bool RemoteMeeting::arrived(int rank, Mailbox& box, std::uint64_t sequence, int expected) {
  for (int lane = 0; lane < kLanes && box.lane < 0; ++lane) {
    if (lane != expected && !is_thorough_) continue;
    Mailbox::Lane& from = box.lanes[lane];
    const unsigned turn = from.taken % 2;
    if (!from.is_full && !transport().done(from.tickets[turn])) continue;
    from.is_full = true;
    std::memcpy(box.words.data(), from.buffers[turn].data(), sizeof(CallWords));
    // Of the call after this one: it came on another lane, and faster.
    if (box.words[0] == ticket_of(generation_, sequence + 1)) continue;
    from.is_full = false;
    ++from.taken;
    box.lane = lane;
    box.frame = from.buffers[turn];
    box.tag = std::string_view(reinterpret_cast<const char*>(box.frame.data()) + sizeof(CallWords),
                               Tag::kBytes);
    peers_[rank].last_words = box.words;
    peers_[rank].last_tag = box.tag;
    peers_[rank].heard = Clock::now();
  }
  return box.lane >= 0;
}

void RemoteMeeting::open(const Call& call, std::uint64_t sequence, const CallOptions& options) {
  check_open();
  call_ = call;
  call_.tag = options.tag;
  call_.sequence = sequence;
  call_.generation = generation_;
  is_thorough_ = false;
  open_data_ = 0;
  if (recorder_) recorder_->claim();
  began_ = Clock::now();
  const Clock::duration timeout = options.timeout.value_or(timeout_);
  deadline_ = timeout < kForever ? Deadline::at(began_ + timeout) : Deadline::never();
  waited_before_ = statistics_.waiting;
  if (recorder_) recorder_->begin(pack(call_), call_.tag, nanoseconds_of(began_));
  check_generation();
  check_notices();
}

const std::vector<CallWords>& RemoteMeeting::begin(const Call& call, const CallOptions& options,
                                                   const Parcels& parcels) {
  open(call, next_sequence_, options);
  ++next_sequence_;
  CallWords& mine = calls_[rank_];
  mine = pack(call_);
  mine[kSplitWord] = static_cast<std::uint64_t>(link_->next_channel);
  for (int i = 1; i < size_; ++i) {
    const int other = (rank_ + i) % size_;
    CallWords words = mine;
    words[kPlaceWord] = parcels.out[other].size();
    words[kResultPlaceWord] = parcels.in[other].size();
    post(other, peers_[other].frames, kFrames, parcels.out[other], words);
  }
  const auto is_there = [&](int other) {
    return arrived(other, peers_[other].frames, call_.sequence, lane_of(parcels.in[other].size()));
  };
  for (int i = 1; i < size_; ++i) {
    const int other = (rank_ + i) % size_;
    await([&] { return is_there(other); },
          [&](int rank) { return rank != rank_ && !is_there(rank); });
    calls_[other] = peers_[other].frames.words;
  }
  for (int other = 0; other < size_; ++other) {
    if (same_fingerprint(calls_[other], mine)) continue;
    std::vector<std::string> texts;
    for (int rank = 0; rank < size_; ++rank)
      texts.push_back(rank == rank_ ? lockstep::describe(call_)
                                    : describe(calls_[rank], peers_[rank].frames.tag));
    fail(describe_difference(texts));
  }
  for (int other = 0; other < size_; ++other)
    if (other != rank_) take(other, peers_[other].frames, kFrames, parcels);
  return calls_;
}

void RemoteMeeting::take(int rank, Mailbox& box, int first, const Parcels& parcels) {
  const auto out = parcels.out[rank];
  const auto in = parcels.in[rank];
  const std::uint64_t sent = box.words[kPlaceWord], expected = box.words[kResultPlaceWord];
  const auto compare = [](int from, std::uint64_t one, int to, std::uint64_t other) {
    return one == other ? std::string()
                        : fmt::format("rank {} sends {} bytes to rank {}, which expects {}", from,
                                      one, to, other);
  };
  // Both ranks say the same.
  std::string wrong[] = {compare(rank, sent, rank_, in.size()),
                         compare(rank_, out.size(), rank, expected)};
  if (rank_ < rank) std::swap(wrong[0], wrong[1]);
  for (const std::string& what : wrong)
    if (!what.empty()) fail(what);
  if (!in.empty() && in.size() <= kMostInFrame) {
    if (kHeaderBytes + in.size() > box.frame.size())
      fail(fmt::format("rank {} sent a frame too short for its {} bytes", rank, in.size()));
    std::memcpy(in.data(), box.frame.data() + kHeaderBytes, in.size());
  }
  Mailbox::Lane& lane = box.lanes[box.lane];
  const unsigned turn = (lane.taken - 1) % 2;
  lane.tickets[turn] =
      transport().receive(members_[rank], channel(first + box.lane), lane.buffers[turn]);
  box.lane = -1;
}

void RemoteMeeting::begin_message(int peer, const Call& call, const CallOptions& options,
                                  const Parcels& parcels) {
  Peer& other = peers_[peer];
  open(call, other.message++, options);
  message_peer_ = peer;
  open_mailbox(peer, other.messages, kMessages);
  const CallWords mine = pack(call_);
  CallWords words = mine;
  words[kPlaceWord] = parcels.out[peer].size();
  words[kResultPlaceWord] = parcels.in[peer].size();
  post(peer, other.messages, kMessages, parcels.out[peer], words);
  const int lane = lane_of(parcels.in[peer].size());
  await([&] { return arrived(peer, other.messages, call_.sequence, lane); },
        [&](int rank) { return rank == peer; });
  message_peer_ = -1;
  if (!same_message(mine, other.messages.words)) fail_between(peer, other.messages);
  take(peer, other.messages, kMessages, parcels);
}

void RemoteMeeting::carry(const Parcels& parcels) {
  std::vector<std::pair<int, Ticket>> open;
  for (int i = 1; i < size_; ++i) {
    const int from = (rank_ + size_ - i) % size_;
    if (parcels.in[from].size() > kMostInFrame)
      open.emplace_back(from, receive(from, kData, parcels.in[from]));
  }
  for (int i = 1; i < size_; ++i) {  // not all to the same one at once
    const int to = (rank_ + i) % size_;
    if (parcels.out[to].size() > kMostInFrame)
      open.emplace_back(to, send(to, kData, parcels.out[to]));
  }
  await_all(open);
}

void RemoteMeeting::await_all(std::vector<std::pair<int, Ticket>>& open) {
  if (open.empty()) return;
  await(
      [&] {
        std::erase_if(open, [&](const auto& one) { return done(one.second); });
        return open.empty();
      },
      [&](int rank) {
        return std::ranges::any_of(open, [&](const auto& one) { return one.first == rank; });
      });
}

RemoteMeeting::Ticket RemoteMeeting::send(int to, Stream stream, std::span<const std::byte> bytes) {
  const Ticket ticket = transport().send(members_[to], channel(kStreams + int{stream}), bytes);
  ++open_data_;
  return ticket;
}

RemoteMeeting::Ticket RemoteMeeting::receive(int from, Stream stream, std::span<std::byte> bytes) {
  const Ticket ticket = transport().receive(members_[from], channel(kStreams + int{stream}), bytes);
  ++open_data_;
  return ticket;
}

RemoteMeeting::Ticket RemoteMeeting::all_reduce(std::span<std::byte> bytes, Dtype dtype,
                                                ReducingTransport::Combining combining) {
  const Ticket ticket = link_->reducing->all_reduce(members_, bytes, dtype, combining);
  ++open_data_;
  return ticket;
}

bool RemoteMeeting::done(Ticket ticket) {
  if (!transport().done(ticket)) return false;
  --open_data_;
  return true;
}

void RemoteMeeting::end(std::uint64_t bytes) {
  const Clock::time_point now = Clock::now();
  ++statistics_.operations;
  statistics_.bytes += bytes;
  statistics_.total += now - began_;
  record_end(now, OperationState::done);
}

void RemoteMeeting::record_end(Clock::time_point now, OperationState state) {
  if (recorder_ &&
      recorder_->end(nanoseconds_of(now), statistics_.waiting - waited_before_, state) &&
      on_records_)
    on_records_();
}

std::string RemoteMeeting::describe(const CallWords& words, const Tag& tag) {
  Call call = unpack(words);
  call.tag = tag;
  return lockstep::describe(call);
}

}  // namespace lockstep
