// Standard output and standard error of the agent. Writing never waits: what a slow reader has not
// taken yet is kept, and the agent's loop passes it on between everything else it does. One thread.
#pragma once

#include <poll.h>

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

#include "lockstep/base/deadline.h"
#include "lockstep/base/file.h"

namespace lockstep {

// For poll(): rounded up, so that the deadline has passed afterwards; -1 for never.
int poll_timeout_ms(const Deadline& deadline);

class Console {
 public:
  // Writes to these descriptors, which stay the caller's.
  Console(int output, int error);

  void write(bool error, std::string_view text);
  // Writes what goes without waiting.
  void pass_on();
  // Waits until all is written or the time is over.
  void flush(Deadline deadline);
  bool idle() const;  // nothing is kept
  // More is kept than a pipe holds several times: who has more to say should be left waiting.
  bool full() const;
  // For poll(): ready when pass_on() can get further; a stream with nothing to write is left out.
  std::array<pollfd, 2> wanted() const;
  // The errno that ended the stream, or 0; its text is dropped from then on.
  int failure(bool error) const { return stream(error).failure; }

 private:
  struct Stream {
    int fd = -1;
    UniqueFd reopened;  // the same file, opened for us alone so that it can be non-blocking
    bool waits = true;  // it can keep a writer waiting: a pipe, terminal, socket; else a file
    bool socket = false;
    std::string kept;
    std::size_t done = 0;  // of `kept`
    int failure = 0;
  };
  void open(Stream& stream, int fd);
  void pass_on(Stream& stream);
  Stream& stream(bool error) { return streams_[error && !same_]; }
  const Stream& stream(bool error) const { return streams_[error && !same_]; }

  std::array<Stream, 2> streams_;
  bool same_ = false;  // both lead to the same place: one queue keeps their order
};

}  // namespace lockstep
