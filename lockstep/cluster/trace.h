// LOCKSTEP_TRACE=FILE: every operation of every rank in one Chrome trace. A rank copies the records
// of its flight recorder to a file of its own, FILE.rank-N, before they are overwritten; at the end
// these and what the flight recorders still hold, also of a rank that was killed, become FILE: by
// the agent, or without one by the last rank to leave. Costs nothing when off; when on, one write
// of 64 kB each 512 operations.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <vector>

#include "lockstep/base/file.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

// One rank's. Any thread of the rank.
class RankTrace {
 public:
  // merges: there is no agent that does. Throws ConfigError if the file cannot be made.
  RankTrace(std::shared_ptr<Segment> segment, int rank, std::filesystem::path trace, bool merges);
  // Copies the rest. What cannot be written is told on standard error: it must not end a job.
  ~RankTrace();
  RankTrace(const RankTrace&) = delete;
  RankTrace& operator=(const RankTrace&) = delete;

  // Copies what has ended since the last time; at least each 512 operations.
  void copy_records();

 private:
  void complain(const char* reason);
  bool is_last() const;

  const std::shared_ptr<Segment> segment_;
  const int rank_;
  const std::filesystem::path trace_;
  const bool merges_;
  std::mutex mutex_;
  UniqueFd file_;  // locked as long as the rank lives
  bool failed_ = false;
  std::uint64_t seen_ = 0;              // the newest serial looked at
  std::vector<std::uint64_t> pending_;  // of those, what was open
};

// By the agent, before workers start: throws ConfigError if FILE cannot be made; removes what an
// earlier job left.
void prepare_trace(const std::filesystem::path& trace, int ranks);
// Makes FILE of what all ranks wrote and removes their files. No rank may be writing. A failure is
// told on standard error: the job has ended in its own way.
void write_trace(Segment& segment, const std::filesystem::path& trace);

}  // namespace lockstep
