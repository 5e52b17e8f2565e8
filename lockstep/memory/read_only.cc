#include "lockstep/memory/read_only.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <mutex>

#include "lockstep/base/error.h"

namespace lockstep {

struct ReadOnlyView::State {
  std::shared_ptr<Segment> segment;
  std::span<std::byte> bytes;
  std::int64_t offset;  // in the segment
  std::vector<NamedBytes> names;
  std::string what;
  std::string hint;
};

namespace {

// What the signal handler can look at without a lock. A view more than fits has no message.
constexpr std::size_t kViews = 64;
std::array<std::atomic<const void*>, kViews> views;  // of ReadOnlyView::State
struct sigaction before;

void forget(const void* view) {
  for (auto& place : views) {
    const void* found = view;
    place.compare_exchange_strong(found, nullptr);
  }
}

void say(std::string_view text) {
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text.data(), text.size());
}

void say(std::size_t number) {
  char digits[20];
  char* at = std::end(digits);
  do *--at = static_cast<char>('0' + number % 10);
  while ((number /= 10) != 0);
  say(std::string_view(at, static_cast<std::size_t>(std::end(digits) - at)));
}

template <typename State>
void name_write(const State& view, std::size_t offset) {
  std::string_view name = "it";
  std::size_t begin = 0;
  for (const NamedBytes& one : view.names)
    if (one.begin <= offset) name = one.name, begin = one.begin;
  say("lockstep: ");
  say(view.what);
  say(": ");
  say(name);
  say(" was written to, at byte ");
  say(offset - begin);
  say(", while it is read-only; hint: ");
  say(view.hint);
  say("\n");
}

template <typename State>
void on_fault(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  for (const auto& place : views) {
    const auto* view = static_cast<const State*>(place.load(std::memory_order_acquire));
    if (view == nullptr) continue;
    const auto begin = reinterpret_cast<std::uintptr_t>(view->bytes.data());
    if (address < begin || address - begin >= view->bytes.size()) continue;
    name_write(*view, address - begin);
    break;
  }
  if ((before.sa_flags & SA_SIGINFO) != 0 && before.sa_sigaction != nullptr)
    return before.sa_sigaction(signal, info, context);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
    return before.sa_handler(signal);
  ::signal(SIGSEGV, SIG_DFL);  // the instruction runs again, and ends the process
  if (info->si_code <= 0) ::raise(SIGSEGV);  // it was no instruction: somebody sent the signal
}

template <typename State>
void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_sigaction = on_fault<State>;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    ::sigaction(SIGSEGV, &action, &before);
  });
}

}  // namespace

ReadOnlyView::ReadOnlyView(std::shared_ptr<Segment> segment, std::span<std::byte> memory,
                           std::vector<NamedBytes> names, std::string what, std::string hint)
    : state_(new State{.segment = std::move(segment),
                       .bytes = {},
                       .offset = 0,
                       .names = std::move(names),
                       .what = std::move(what),
                       .hint = std::move(hint)}) {
  const std::int64_t offset = state_->segment->offset_of(memory.data());
  LOCKSTEP_CHECK(offset >= 0 && offset % ::sysconf(_SC_PAGESIZE) == 0);
  void* base = ::mmap(nullptr, memory.size(), PROT_READ, MAP_SHARED, state_->segment->fd(), offset);
  if (base == MAP_FAILED)
    throw Error(fmt::format("cannot map {} of shared memory read-only for {}: {}", memory.size(),
                            state_->what, errno_text(errno)));
  ::madvise(base, memory.size(), MADV_HUGEPAGE);
  state_->bytes = {static_cast<std::byte*>(base), memory.size()};
  state_->offset = offset;
  install_handler<State>();
  for (auto& place : views) {
    const void* nothing = nullptr;
    if (place.compare_exchange_strong(nothing, state_.get())) break;
  }
}

ReadOnlyView::~ReadOnlyView() {
  forget(state_.get());
  ::munmap(state_->bytes.data(), state_->bytes.size());
}

std::span<std::byte> ReadOnlyView::bytes() const { return state_->bytes; }

void ReadOnlyView::set_writable(bool writable) {
  if (::mprotect(state_->bytes.data(), state_->bytes.size(),
                 writable ? PROT_READ | PROT_WRITE : PROT_READ) != 0)
    throw Error(
        fmt::format("{}: cannot change its protection: {}", state_->what, errno_text(errno)));
}

void ReadOnlyView::make_private() {
  forget(state_.get());
  const std::span<std::byte> bytes = state_->bytes;
  const std::int64_t offset = state_->offset;
  if (::mmap(bytes.data(), bytes.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
             state_->segment->fd(), offset) == MAP_FAILED)
    throw Error(fmt::format("{}: cannot make it private: {}", state_->what, errno_text(errno)));
}

}  // namespace lockstep
