// Messages that carry descriptors over a Unix socket. Any thread.
#pragma once

#include <sys/types.h>

#include <span>
#include <vector>

#include "lockstep/base/file.h"

namespace lockstep {

inline constexpr std::size_t kMostDescriptors = 4;  // in one message

// As ::send(): the bytes sent, or -1 and errno.
ssize_t send_with_descriptors(int socket, std::span<const char> bytes,
                              std::span<const int> descriptors, int flags);

struct ReceivedMessage {
  ssize_t bytes = -1;                 // as ::recv(): 0 at the end, -1 and errno
  bool cut = false;                   // there were more bytes or descriptors than fit
  std::vector<UniqueFd> descriptors;  // close-on-exec
};
// Waits for a message; begins again where a signal came.
ReceivedMessage receive_with_descriptors(int socket, std::span<char> bytes);

}  // namespace lockstep
