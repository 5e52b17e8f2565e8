// torch.distributed's TCPStore: how processes that torchrun started on several nodes find each
// other. Any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lockstep/base/deadline.h"

namespace lockstep {

struct StoreAddress {
  std::string host;
  std::uint16_t port = 0;
};
// Connects to a store that somebody else serves; puts `mine` there under `name` and this rank, and
// waits for what the other ranks put. By rank. Throws CommError: no store, or who did not come.
std::vector<std::string> exchange_over_store(const StoreAddress& store, const std::string& name,
                                             int rank, int size, const std::string& mine,
                                             Clock::duration timeout);

}  // namespace lockstep
