#include "lockstep/memory/segment.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"
#include "lockstep/memory/available_memory.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/flight_recorder.h"
#include "lockstep/memory/generation_board.h"

namespace lockstep {
namespace {

constexpr std::uint64_t kMagic = 0x6d67657370657473;  // "stepsegm"
constexpr std::uint32_t kLayoutVersion = 3;
constexpr std::uint64_t kAlignment = 64;
constexpr std::uint64_t kArenaAlignment = 2 << 20;  // a huge page
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// What attach() must know before it can map: plain numbers, followed by the words that change.
struct Preamble {
  std::uint64_t magic = kMagic;
  std::uint32_t layout_version = kLayoutVersion;
  std::uint32_t seats = 0;
  std::uint64_t arena_bytes = 0;
  std::uint64_t total_bytes = 0;
  std::uint64_t control_block_bytes = sizeof(ControlBlock);
};

struct Header {
  Preamble preamble;
  alignas(64) std::atomic<std::uint32_t> abort_word;
  std::atomic<std::uint32_t> abort_claimed;
  std::atomic<std::uint64_t> failed_word;
  SharedText<1000> abort_reason;
  // Of the node's arena, as in ControlBlock.
  std::atomic<std::uint64_t> arena_used;
  std::atomic<std::uint64_t> arena_lasting;
  GenerationBoard board;
};

// Everything's place follows from two numbers; no offset is ever read from the segment.
struct Layout {
  std::uint64_t seats = 0;
  std::uint64_t arena_bytes = 0;  // a multiple of kArenaAlignment
  std::uint64_t control_offset() const { return round_up(sizeof(Header), kAlignment); }
  std::uint64_t recorders_offset() const {
    return round_up(control_offset() + seats * sizeof(ControlBlock), kAlignment);
  }
  std::uint64_t arenas_offset() const {
    return round_up(recorders_offset() + seats * sizeof(FlightRecorder), kArenaAlignment);
  }
  std::uint64_t arena_offset(std::uint64_t arena) const {
    return arenas_offset() + arena * arena_bytes;
  }
  std::uint64_t total_bytes() const { return arena_offset(seats + 1); }  // the node's is the last
};

// Nothing if the numbers are out of range.
std::optional<Layout> checked_layout(std::uint64_t seats, std::uint64_t arena_bytes) {
  constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 46;  // x86-64 maps no more than 2^47
  if (seats < 1 || seats > kMaxSeats || arena_bytes < 1 || arena_bytes > kMaxBytes / (seats + 1))
    return std::nullopt;
  return Layout{seats, round_up(arena_bytes, kArenaAlignment)};
}

constexpr std::string_view kSegment = "the shared memory segment";

void* map(int fd, std::uint64_t bytes) {
  require_address_space(bytes, kSegment);
  void* base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED)
    throw Error(fmt::format("cannot map a shared memory segment of {}: {}", byte_text(bytes),
                            errno_text(errno)));
  ::madvise(base, bytes, MADV_HUGEPAGE);  // a wish: not every kernel grants it
  return base;
}

// 0 or the errno. A signal handler of the program's own must not look like a lack of memory.
int reserve(int fd, std::uint64_t offset, std::uint64_t bytes) {
  while (::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)) != 0)
    if (errno != EINTR) return errno;
  return 0;
}

void give_back(int fd, std::uint64_t offset, std::uint64_t bytes) {
  ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
              static_cast<off_t>(bytes));
}

// In pieces, each after a look at what is left: ranks that reserve at the same time take it from
// each other, and beyond the limit of a control group the kernel kills.
void reserve_or_throw(int fd, std::uint64_t offset, std::uint64_t bytes, std::string_view what) {
  constexpr std::uint64_t kPiece = 32 << 20;
  std::uint64_t done = 0;
  try {
    for (std::uint64_t piece = 0; done < bytes; done += piece) {
      AvailableMemory available = available_memory();
      available.bytes += std::min(done, ~available.bytes);
      require_memory(bytes, available, what);
      piece = std::min(kPiece, bytes - done);
      if (const int reason = reserve(fd, offset + done, piece))
        throw Error(fmt::format(
            "cannot reserve {} of shared memory for {}: {} ({} free, limited by {}); hint: fewer "
            "workers, a smaller model or batch, or more memory",
            byte_text(bytes), what, errno_text(reason), byte_text(available.bytes),
            available.limited_by));
    }
  } catch (const Error&) {
    if (done != 0) give_back(fd, offset, done);
    throw;
  }
}

}  // namespace

struct Segment::State {
  UniqueFd fd;
  Layout layout;
  std::byte* base = nullptr;

  State(UniqueFd descriptor, Layout where)
      : fd(std::move(descriptor)),
        layout(where),
        base(static_cast<std::byte*>(map(fd.get(), where.total_bytes()))) {}
  ~State() { ::munmap(base, layout.total_bytes()); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  Header& header() const { return *reinterpret_cast<Header*>(base); }
  std::byte* arena(int number) const { return base + layout.arena_offset(number); }
};

Segment::Segment(std::unique_ptr<State> state) : state_(std::move(state)) {}
Segment::~Segment() = default;

std::shared_ptr<Segment> Segment::create(const SegmentOptions& options) {
  if (options.seats < 1 || options.seats > kMaxSeats)
    throw ConfigError(fmt::format("a segment for {} ranks is impossible", options.seats),
                      fmt::format("1 to {} workers on a node", kMaxSeats));
  const std::uint64_t arena_bytes = options.arena_bytes != 0 ? options.arena_bytes : total_memory();
  const auto layout = checked_layout(options.seats, arena_bytes);
  if (!layout)
    throw ConfigError(fmt::format("an arena of {} for each of {} ranks is too large",
                                  byte_text(arena_bytes), options.seats));
  UniqueFd fd(::memfd_create("lockstep", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) throw Error("cannot create a shared memory segment: " + errno_text(errno));
  const std::uint64_t fixed_bytes = layout->arenas_offset();
  require_memory(fixed_bytes, available_memory(), kSegment);
  require_file_size(layout->total_bytes(), kSegment);
  if (::ftruncate(fd.get(), static_cast<off_t>(layout->total_bytes())) != 0 ||
      (errno = reserve(fd.get(), 0, fixed_bytes)) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0)
    throw Error(fmt::format("cannot size a shared memory segment to {}: {}",
                            byte_text(layout->total_bytes()), errno_text(errno)));
  auto state = std::make_unique<State>(std::move(fd), *layout);
  state->header().preamble = {.seats = static_cast<std::uint32_t>(layout->seats),
                              .arena_bytes = layout->arena_bytes,
                              .total_bytes = layout->total_bytes()};
  return std::shared_ptr<Segment>(new Segment(std::move(state)));
}

std::shared_ptr<Segment> Segment::attach(UniqueFd fd) {
  const auto wrong = [&](const std::string& what) {
    return Error(fmt::format("descriptor {} is not a usable segment: {}", fd.get(), what));
  };
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0) throw wrong("it is not a memfd (" + errno_text(errno) + ")");
  if ((seals & kSeals) != kSeals) throw wrong("its size is not sealed");
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) throw wrong(errno_text(errno));
  const auto size = static_cast<std::uint64_t>(status.st_size);
  // Read, not mapped: a copy that nobody can change between the check and the use.
  Preamble found{};
  if (::pread(fd.get(), &found, sizeof(found), 0) != static_cast<ssize_t>(sizeof(found)))
    throw wrong(fmt::format("it has {} bytes, too few for a header", size));
  if (found.magic != kMagic) throw wrong("its magic number is wrong");
  if (found.layout_version != kLayoutVersion || found.control_block_bytes != sizeof(ControlBlock))
    throw wrong(
        fmt::format("its layout is version {}, this program's is {}: both must be built "
                    "from the same release",
                    found.layout_version, kLayoutVersion));
  const auto layout = checked_layout(found.seats, found.arena_bytes);
  if (!layout || layout->arena_bytes != found.arena_bytes)
    throw wrong(
        fmt::format("it claims {} seats with arenas of {} bytes", found.seats, found.arena_bytes));
  if (layout->total_bytes() != size || found.total_bytes != size)
    throw wrong(fmt::format("it has {} bytes, its header says {}", size, layout->total_bytes()));
  return std::shared_ptr<Segment>(new Segment(std::make_unique<State>(std::move(fd), *layout)));
}

int Segment::fd() const { return state_->fd.get(); }
int Segment::seats() const { return static_cast<int>(state_->layout.seats); }

ControlBlock& Segment::control(int seat) {
  LOCKSTEP_CHECK(seat >= 0 && seat < seats());
  return reinterpret_cast<ControlBlock*>(state_->base + state_->layout.control_offset())[seat];
}

FlightRecorder& Segment::recorder(int seat) {
  LOCKSTEP_CHECK(seat >= 0 && seat < seats());
  return reinterpret_cast<FlightRecorder*>(state_->base + state_->layout.recorders_offset())[seat];
}

GenerationBoard& Segment::board() { return state_->header().board; }

std::atomic<std::uint32_t>& Segment::abort_word() { return state_->header().abort_word; }
std::atomic<std::uint64_t>& Segment::failed_word() { return state_->header().failed_word; }

void Segment::abort(std::string_view reason) {
  Header& header = state_->header();
  if (header.abort_claimed.exchange(1) == 0) header.abort_reason.set(reason);
  // Also when another's claim stands: it may have died before it came here.
  header.abort_word.store(1);
  wake_all();
}

std::string Segment::abort_reason() const {
  const Header& header = state_->header();
  if (header.abort_word.load() == 0) return "";
  const std::string reason = header.abort_reason.get();
  return reason.empty() ? "(the reason is not written yet)" : reason;
}

void Segment::wake_all() {
  for (int seat = 0; seat < seats(); ++seat) ring(control(seat).bell);
}

struct Segment::ArenaUse {
  std::atomic<std::uint64_t>&used, &lasting;
};

Segment::ArenaUse Segment::use_of(int arena) {
  if (arena == node_arena()) return {state_->header().arena_used, state_->header().arena_lasting};
  return {control(arena).arena_used, control(arena).arena_lasting};
}

std::span<std::byte> Segment::take(int arena, std::size_t bytes, bool lasting,
                                   std::string_view what) {
  const ArenaUse use = use_of(arena);
  const std::uint64_t used = use.used.load(std::memory_order_relaxed);
  const std::uint64_t kept = use.lasting.load(std::memory_order_relaxed);
  const std::uint64_t arena_bytes = state_->layout.arena_bytes;
  if (used > arena_bytes || kept > arena_bytes - used || (used | kept) % kAlignment != 0)
    throw Error(
        fmt::format("the control block of rank {} is corrupt: {} and {} of {} arena bytes "
                    "in use",
                    arena, used, kept, arena_bytes));
  const std::uint64_t left = arena_bytes - used - kept;
  if (bytes > left)
    throw Error(fmt::format(
        "no room for {} in the arena of rank {}: {} needed, {} of {} left; hint: fewer workers or "
        "a smaller model",
        what, arena, byte_text(bytes), byte_text(left), byte_text(arena_bytes)));
  // All sizes are multiples of the alignment, so this stays inside.
  const std::uint64_t rounded = round_up(bytes, kAlignment);
  const std::uint64_t begin = lasting ? arena_bytes - kept - rounded : used;
  const std::uint64_t offset = state_->layout.arena_offset(arena) + begin;
  // A late rank of a generation that failed may have written there since it was given back.
  if (bytes != 0) give_back(state_->fd.get(), offset, rounded);
  reserve_or_throw(state_->fd.get(), offset, bytes, what);
  if (lasting)
    use.lasting.store(kept + rounded, std::memory_order_relaxed);
  else
    use.used.store(used + rounded, std::memory_order_relaxed);
  return {state_->base + offset, bytes};
}

std::span<std::byte> Segment::allocate(int arena, std::size_t bytes, std::string_view what) {
  return take(arena, bytes, false, what);
}

std::span<std::byte> Segment::allocate_lasting(int arena, std::size_t bytes,
                                               std::string_view what) {
  return take(arena, bytes, true, what);
}

void Segment::release(int arena, std::span<std::byte> memory) {
  if (memory.empty()) return;
  LOCKSTEP_CHECK(arena_owner(memory.data()) == arena);
  const std::uint64_t start = static_cast<std::uint64_t>(memory.data() - state_->arena(arena));
  // Whole alignment units, so that what the next owner gets there is zero again.
  const std::uint64_t bytes = round_up(memory.size(), kAlignment);
  give_back(state_->fd.get(), state_->layout.arena_offset(arena) + start, bytes);
  auto& used_word = use_of(arena).used;
  if (used_word.load(std::memory_order_relaxed) == start + bytes)
    used_word.store(start, std::memory_order_relaxed);
}

void Segment::reset(int seat) {
  give_back(state_->fd.get(), state_->layout.arena_offset(seat), state_->layout.arena_bytes);
  // Nobody else has a reason to look at these, but who looks finds atomics.
  for (const auto& [begin, bytes] :
       {std::pair{reinterpret_cast<std::byte*>(&control(seat)), sizeof(ControlBlock)},
        std::pair{reinterpret_cast<std::byte*>(&recorder(seat)), sizeof(FlightRecorder)}})
    std::memset(begin, 0, bytes);
}

std::int64_t Segment::offset_of(const void* pointer) const {
  const auto base = reinterpret_cast<std::uintptr_t>(state_->base);
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const bool inside = address >= base + state_->layout.arenas_offset() &&
                      address < base + state_->layout.total_bytes();
  return inside ? static_cast<std::int64_t>(address - base) : -1;
}

int Segment::arena_owner(const void* pointer) const {
  const std::int64_t offset = offset_of(pointer);
  if (offset < 0) return -1;
  return static_cast<int>((static_cast<std::uint64_t>(offset) - state_->layout.arenas_offset()) /
                          state_->layout.arena_bytes);
}

std::span<std::byte> Segment::at(std::uint64_t offset, std::uint64_t bytes) const {
  const std::uint64_t first = state_->layout.arenas_offset();
  const std::uint64_t arena = offset < first ? 0 : (offset - first) / state_->layout.arena_bytes;
  return at(static_cast<int>(std::min(arena, state_->layout.seats)), offset, bytes);
}

std::span<std::byte> Segment::at(int arena, std::uint64_t offset, std::uint64_t bytes) const {
  LOCKSTEP_CHECK(arena >= 0 && arena <= seats());
  const std::uint64_t start = state_->layout.arena_offset(arena);
  if (offset < start || !in_bounds(offset - start, bytes, state_->layout.arena_bytes))
    throw Error(fmt::format("rank {} named {} bytes at offset {}, outside its arena", arena, bytes,
                            offset));
  return {state_->base + offset, bytes};
}

}  // namespace lockstep
