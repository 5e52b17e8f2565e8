// Saving checkpoints while training goes on: save() copies what it is given, so that later steps
// cannot leak in, and one thread at a time writes the copy.
//
// Owner: whoever trains. Threads: one calls; a thread of the saver's own writes.
#pragma once

#include <cstddef>
#include <filesystem>
#include <future>
#include <optional>

#include "lockstep/base/deadline.h"
#include "lockstep/checkpoint/checkpoint.h"

namespace lockstep {

class AsyncSaver {
 public:
  explicit AsyncSaver(std::filesystem::path folder, CheckpointOptions options = {})
      : folder_(std::move(folder)), options_(std::move(options)) {}
  // Waits for the one in flight. Its error is lost: call wait() where that matters.
  ~AsyncSaver() = default;
  AsyncSaver(const AsyncSaver&) = delete;
  AsyncSaver& operator=(const AsyncSaver&) = delete;

  // One is in flight at a time: waits for the one before and throws its error (then nothing of this
  // one is saved). When it returns, `contents` may change. `keep_also` replaces that of the
  // options.
  void save(const CheckpointContents& contents,
            std::optional<std::vector<std::uint64_t>> keep_also = {},
            Deadline deadline = Deadline::never());
  bool is_idle() const {  // save() would not wait
    return !in_flight_.valid() ||
           in_flight_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }
  // Returns when nothing is in flight; throws the error of the one that was, or Error at the
  // deadline.
  void wait(Deadline deadline = Deadline::never());

 private:
  std::filesystem::path folder_;
  CheckpointOptions options_;
  CheckpointContents copy_;        // its views point into memory_
  std::vector<std::byte> memory_;  // kept from one save to the next
  std::future<void> in_flight_;    // last: joins before what the thread reads goes
};

}  // namespace lockstep
