#include "lockstep/cluster/trace.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "lockstep/base/error.h"
#include "lockstep/collective/operation_record.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::size_t kBufferBytes = 1 << 20;

fs::path part_of(const fs::path& trace, int rank) {
  return fmt::format("{}.rank-{}", trace.string(), rank);
}

UniqueFd open_or_refuse(const fs::path& path) {
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666));
  if (!fd)
    throw ConfigError(
        fmt::format("LOCKSTEP_TRACE: cannot write {}: {}", path.string(), errno_text(errno)),
        "name a file in a folder that exists");
  return fd;
}

// A Chrome trace ("Trace Event Format", the JSON object form, as Perfetto opens it). Appears under
// its name when it is complete.
class TraceFile {
 public:
  explicit TraceFile(const fs::path& path)
      : path_(path),
        temporary_(path.string() + ".tmp"),
        fd_(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)),
        buffer_(R"({"displayTimeUnit":"ns","traceEvents":[)") {
    if (!fd_) throw error(errno);
  }
  ~TraceFile() {
    if (fd_) ::unlink(temporary_.c_str());
  }
  TraceFile(const TraceFile&) = delete;
  TraceFile& operator=(const TraceFile&) = delete;

  void add(const json& event) {
    buffer_ += first_ ? "\n" : ",\n";
    buffer_ += event.dump(-1, ' ', false, json::error_handler_t::replace);
    first_ = false;
    if (buffer_.size() >= kBufferBytes) flush();
  }
  void finish() {
    buffer_ += "\n]}\n";
    flush();
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) throw error(errno);
    fd_ = UniqueFd();
  }

 private:
  Error error(int reason) const {
    return Error(fmt::format("cannot write {}: {}", path_.string(), errno_text(reason)));
  }
  void flush() {
    if (const int reason = write_all(fd_.get(), as_byte_span(buffer_))) throw error(reason);
    buffer_.clear();
  }

  const fs::path path_;
  const fs::path temporary_;
  UniqueFd fd_;
  std::string buffer_;
  bool first_ = true;
};

// Adds the operations of one rank to the trace; a group is a thread.
class RankEvents {
 public:
  RankEvents(TraceFile& file, int rank, std::int64_t now_ns)
      : file_(file), rank_(rank), now_ns_(now_ns) {
    name_it("process_name", 0, fmt::format("rank {}", rank));
  }

  void add(const OperationCopy& copy) {
    const RecordedOperation operation = operation_from(copy);
    const Call& call = operation.call;
    const std::int64_t start = std::clamp<std::int64_t>(operation.started_at_ns, 0, now_ns_);
    const std::int64_t end = operation.state == OperationState::open
                                 ? now_ns_
                                 : std::clamp<std::int64_t>(operation.ended_at_ns, start, now_ns_);
    file_.add({{"name", operation.name()},
               {"ph", "X"},
               {"pid", rank_},
               {"tid", thread_of(operation.group)},
               {"ts", microseconds(start)},
               {"dur", microseconds(end - start)},
               {"args",
                {{"call", describe(call)},
                 {"tag", std::string(call.tag.view())},
                 {"dtype", has_name(call.dtype) ? name_of(call.dtype) : "?"},
                 {"bytes", operation.bytes()},
                 {"sequence", call.sequence},
                 {"generation", call.generation},
                 {"waited_us", microseconds(operation.waited.count())},
                 {"state", name_of(operation.state)}}}});
  }

 private:
  static bool has_name(Dtype dtype) { return static_cast<int>(dtype) < kDtypeCount; }
  int thread_of(const std::string& group) {
    const auto [thread, is_new] = threads_.try_emplace(group, static_cast<int>(threads_.size()));
    if (is_new) name_it("thread_name", thread->second, group.empty() ? "all ranks" : group);
    return thread->second;
  }
  void name_it(const char* what, int thread, const std::string& name) {
    file_.add(
        {{"name", what}, {"ph", "M"}, {"pid", rank_}, {"tid", thread}, {"args", {{"name", name}}}});
  }
  static double microseconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-3; }

  TraceFile& file_;
  const int rank_;
  const std::int64_t now_ns_;
  std::map<std::string, int> threads_;
};

void add_rank(TraceFile& file, Segment& segment, int rank, const fs::path& part,
              std::int64_t now_ns) {
  RankEvents events(file, rank, now_ns);
  // The rest overlaps what was copied.
  const auto rest = read_records(segment.recorder(rank));
  const std::uint64_t oldest = rest.empty() ? ~std::uint64_t{0} : rest.front().serial;
  std::unordered_set<std::uint64_t> copied;
  std::ifstream input(part, std::ios::binary);
  OperationCopy copy;
  while (input.read(reinterpret_cast<char*>(&copy), sizeof(copy))) {
    if (copy.serial >= oldest) copied.insert(copy.serial);
    events.add(copy);
  }
  for (const OperationCopy& record : rest)
    if (!copied.contains(record.serial)) events.add(record);
}

}  // namespace

RankTrace::RankTrace(std::shared_ptr<Segment> segment, int rank, fs::path trace, bool merges)
    : segment_(std::move(segment)),
      rank_(rank),
      trace_(fs::absolute(trace)),
      merges_(merges),
      file_(open_or_refuse(part_of(trace_, rank))) {
  if (::flock(file_.get(), LOCK_EX | LOCK_NB) != 0)
    throw ConfigError(
        fmt::format("LOCKSTEP_TRACE: {} is in use by another job", part_of(trace_, rank_).string()),
        "another file for each job");
  if (::ftruncate(file_.get(), 0) != 0) complain(errno_text(errno).c_str());
}

void RankTrace::copy_records() {
  const std::lock_guard lock(mutex_);
  if (failed_) return;
  std::vector<std::uint64_t> wanted = std::exchange(pending_, {});
  const std::uint64_t newest = segment_->recorder(rank_).opened.load();
  const std::uint64_t oldest = newest - std::min<std::uint64_t>(newest, kRecordedOperations) + 1;
  for (std::uint64_t serial = std::max(seen_ + 1, oldest); serial <= newest; ++serial)
    wanted.push_back(serial);
  if (wanted.empty()) return;
  seen_ = newest;
  std::vector<OperationCopy> ended;
  auto next = wanted.begin();
  for (const OperationCopy& copy : read_records(segment_->recorder(rank_), wanted.front() - 1)) {
    next = std::lower_bound(next, wanted.end(), copy.serial);
    if (next == wanted.end()) break;
    if (*next != copy.serial || copy.ended_at_ns == 0) continue;
    ended.push_back(copy);
    next = wanted.erase(next);
  }
  pending_ = std::move(wanted);
  if (pending_.size() > kRecordedOperations) pending_.clear();  // overwritten meanwhile
  if (const int reason = write_all(file_.get(), std::as_bytes(std::span(ended))))
    complain(errno_text(reason).c_str());
}

void RankTrace::complain(const char* reason) {
  failed_ = true;
  std::fprintf(stderr, "lockstep: cannot write %s: %s; rank %d's trace ends here\n",
               part_of(trace_, rank_).c_str(), reason, rank_);
}

bool RankTrace::is_last() const {
  for (int rank = 0; rank < segment_->seats(); ++rank) {
    const UniqueFd other(::open(part_of(trace_, rank).c_str(), O_RDONLY | O_CLOEXEC));
    if (other && ::flock(other.get(), LOCK_EX | LOCK_NB) != 0) return false;
  }
  return true;
}

RankTrace::~RankTrace() {
  copy_records();
  file_ = UniqueFd();
  if (!merges_) return;
  const std::string lock = trace_.string() + ".lock";
  const UniqueFd merging(::open(lock.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666));
  if (merging) ::flock(merging.get(), LOCK_EX);  // two may leave at once
  if (!is_last()) return;
  if (::access(part_of(trace_, rank_).c_str(), F_OK) == 0) write_trace(*segment_, trace_);
  ::unlink(lock.c_str());
}

void prepare_trace(const fs::path& trace, int ranks) {
  open_or_refuse(trace);
  for (int rank = 0; rank < ranks; ++rank) fs::remove(part_of(trace, rank));
}

void write_trace(Segment& segment, const fs::path& trace) {
  const std::int64_t now_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(
                                  std::chrono::steady_clock::now().time_since_epoch())
                                  .count();
  try {
    TraceFile file(trace);
    for (int rank = 0; rank < segment.seats(); ++rank)
      if (std::error_code none; segment.recorder(rank).opened.load() != 0 ||
                                (fs::file_size(part_of(trace, rank), none) > 0 && !none))
        add_rank(file, segment, rank, part_of(trace, rank), now_ns);
    file.finish();
    for (int rank = 0; rank < segment.seats(); ++rank) fs::remove(part_of(trace, rank));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "lockstep: no trace: %s\n", error.what());
  }
}

}  // namespace lockstep
