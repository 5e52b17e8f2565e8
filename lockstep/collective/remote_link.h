// One transport and what all groups over it share. Owned by these groups; one thread. Private to
// this layer.
#pragma once

#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lockstep/collective/group.h"
#include "lockstep/collective/plan_choice.h"
#include "lockstep/transport/transport.h"

namespace lockstep {

struct RemoteLink {
  explicit RemoteLink(std::unique_ptr<Transport> over_this) : transport(std::move(over_this)) {}

  // Where something may arrive until the transport ends, also when the group that waited for it is
  // gone. Zeroed.
  std::span<std::byte> lasting(std::size_t bytes) { return memory.emplace_back(bytes); }
  // Of all groups: a call's memory must not be touched any more when the call has failed.
  void end(const std::string& why) {
    if (over.empty()) over = why;
    transport->abort();
  }

  std::deque<std::vector<std::byte>> memory;
  const std::unique_ptr<Transport> transport;
  // The same, where the engine reduces by itself.
  ReducingTransport* const reducing = dynamic_cast<ReducingTransport*>(transport.get());
  int next_channel = 0;  // no group has used this one or a later one
  bool may_spin = false;
  LinkCosts costs;   // measured by all ranks when they first met, the same on all
  std::string over;  // the message that ended the transport
};

// Waits until all ranks of the transport have joined: the same version, generation, size; each
// proves to each that it knows the key; and they measure their links. Takes the link's first
// channels. Throws CommError.
void join_remote(RemoteLink& link, const GroupOptions& options);

}  // namespace lockstep
