// How ranks of different nodes meet: each sends each a frame with its call, and what data fits; it
// waits for all the others', and compares. Larger data follows only then, so that both ends of
// every message agree on its length. Owned by one group, one thread. Private to this layer.
//
// A frame has one of a few lengths (a lane, which is a channel), for which receives are always
// open: who calls with other lengths than the others is found on another lane than was expected. A
// rank is at most one call ahead of another, so that two receives a lane are enough.
//
// When a group ends before its time, its rank tells all others why (a notice). If data was on its
// way, the transport ends with it, and all groups over it: no engine can take back one message.
//
// Files: remote_meeting.cc (frames and data), remote_wait.cc (waiting, and how a wait ends).
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lockstep/collective/call.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/operation_record.h"
#include "lockstep/collective/remote_link.h"

namespace lockstep {

// What a call sends each rank and has from each; nothing: that rank gets only the frame. This
// rank's own entries are not looked at.
struct Parcels {
  explicit Parcels(int size) : out(size), in(size) {}
  std::vector<std::span<const std::byte>> out;
  std::vector<std::span<std::byte>> in;
};

class RemoteMeeting {
 public:
  // More does not travel in the frame.
  static constexpr std::size_t kMostInFrame = 4096;
  enum Stream : std::uint16_t { kData, kSums };

  // members: the transport's ranks, by rank of this group. Takes kChannels from `channel` on.
  RemoteMeeting(std::shared_ptr<RemoteLink> link, std::vector<int> members, int rank, int channel,
                const GroupOptions& options, std::string name);
  ~RemoteMeeting();  // tells the others that this rank is gone
  RemoteMeeting(const RemoteMeeting&) = delete;
  RemoteMeeting& operator=(const RemoteMeeting&) = delete;
  static constexpr int kChannels = 9;

  // Opens an operation, waits until all ranks have, compares. What fits into frames has arrived
  // when it returns; carry() has the rest. Returns all ranks' calls; valid until the next one.
  const std::vector<CallWords>& begin(const Call& call, const CallOptions& options,
                                      const Parcels& parcels);
  // The same between this rank and `peer` alone (call.operation: send or recv).
  void begin_message(int peer, const Call& call, const CallOptions& options,
                     const Parcels& parcels);
  void carry(const Parcels& parcels);
  void end(std::uint64_t bytes);

  // Data of the operation that is open: between two ranks, sends and receives of a stream meet in
  // order.
  using Ticket = Transport::Ticket;
  Ticket send(int to, Stream stream, std::span<const std::byte> bytes);
  Ticket receive(int from, Stream stream, std::span<std::byte> bytes);
  Ticket all_reduce(std::span<std::byte> bytes, Dtype dtype,
                    ReducingTransport::Combining combining);  // by the engine
  bool done(Ticket ticket);
  bool has_left(int rank) const { return peers_[rank].has_left; }
  // Until done(). waits_for(rank): is it one that keeps us waiting?
  using Done = std::function<bool()>;
  using WaitsFor = std::function<bool(int)>;
  void await(const Done& done, const WaitsFor& waits_for);
  void await_all(std::vector<std::pair<int, Ticket>>& open);  // with which rank

  // End the group on all ranks. Throw CommError.
  [[noreturn]] void fail(const std::string& what);
  [[noreturn]] void lost(const TransportError& error);
  // Throws once the group is over.
  void check_open() const;
  bool is_over() const { return !over_.empty() || !link_->over.empty(); }

  const GroupStatistics& statistics() const { return statistics_; }
  const std::shared_ptr<RemoteLink>& link() const { return link_; }
  const std::vector<int>& members() const { return members_; }

 private:
  static constexpr int kLanes = 3;
  static constexpr std::size_t kHeaderBytes = sizeof(CallWords) + Tag::kBytes;
  static constexpr std::size_t kLaneBytes[kLanes] = {128, 1024, kHeaderBytes + kMostInFrame};
  static constexpr std::size_t kNoticeBytes = 1024;
  enum : std::uint32_t { kLeft = 1, kFailed = 2 };  // kinds of notices
  // Channels, after the group's first.
  enum : std::uint16_t { kFrames = 0, kMessages = kLanes, kNotices = 2 * kLanes, kStreams };

  // Frames to and from one rank, of collectives or of messages.
  struct Mailbox {
    struct Lane {
      std::array<std::span<std::byte>, 2> buffers;  // in turn
      std::array<Ticket, 2> tickets{};
      unsigned taken = 0;
      bool is_full = false;  // with what is not to be taken yet
    };
    std::array<Lane, kLanes> lanes;
    std::array<std::span<std::byte>, 2> out;  // in turn
    std::array<std::optional<Ticket>, 2> sent;
    unsigned sends = 0;
    bool is_open = false;
    int lane = -1;  // of the frame that has arrived; -1: none has
    std::span<const std::byte> frame;
    CallWords words{};  // its
    Tag tag;
  };
  struct Peer {
    Mailbox frames, messages;
    std::uint64_t message = 0;  // number of the next
    std::span<std::byte> notice_out, notice;
    std::optional<Ticket> noticing, telling;  // the others' notice, own one
    bool has_left = false;
    std::optional<Clock::time_point> heard;
    CallWords last_words{};  // of its newest frame
    Tag last_tag;
  };

  static int lane_of(std::size_t bytes);
  std::uint16_t channel(int offset) const { return static_cast<std::uint16_t>(channel_ + offset); }
  void open_mailbox(int rank, Mailbox& box, int first);
  void post(int rank, Mailbox& box, int first, std::span<const std::byte> payload, CallWords words);
  // Whether the frame is there; looks at all lanes when a wait gets long.
  bool arrived(int rank, Mailbox& box, std::uint64_t sequence, int lane);
  // Copies what came for this rank, and is ready for the next frame. Throws unless both ranks
  // expect the same lengths.
  void take(int rank, Mailbox& box, int first, const Parcels& parcels);
  void open(const Call& call, std::uint64_t sequence, const CallOptions& options);

  void await_slowly(const Done& done, const WaitsFor& waits_for);
  void check(const Done& done, const WaitsFor& waits_for);
  void check_notices();
  void check_generation();
  void notify(std::uint32_t kind, const std::string& text);
  void flush_notices(Clock::duration at_most, bool until_all_left) noexcept;
  [[noreturn]] void end_with(const std::string& message);
  void record_end(Clock::time_point now, OperationState state);
  static std::string describe(const CallWords& words, const Tag& tag);
  // This rank's call does not fit that one of another.
  [[noreturn]] void fail_between(int peer, const Mailbox& box);
  std::string last_seen(int rank) const;
  std::string operation_text() const;
  std::string describe_peer(int rank) const { return transport().describe(members_[rank]); }
  Transport& transport() const { return *link_->transport; }

  const std::shared_ptr<RemoteLink> link_;
  const std::vector<int> members_;
  const int rank_;
  const int size_;
  const int channel_;
  const std::string name_;  // for messages; "" for the group of all
  const std::uint64_t generation_;
  const Clock::duration timeout_;
  const std::function<std::string()> is_generation_over_;
  const std::function<void()> on_records_;
  std::optional<OperationRecorder> recorder_;
  std::vector<Peer> peers_;  // by rank
  std::uint64_t next_sequence_ = 0;
  std::vector<CallWords> calls_;

  Call call_;  // the operation that is open or was last
  Clock::time_point began_{};
  Deadline deadline_ = Deadline::never();
  bool is_thorough_ = false;  // a wait gets long
  int message_peer_ = -1;     // whom a message is with
  int open_data_ = 0;         // messages under way in the caller's memory
  std::string over_;          // the message that ended the group
  GroupStatistics statistics_;
  Clock::duration waited_before_{};  // statistics_.waiting when the operation began
};

}  // namespace lockstep
