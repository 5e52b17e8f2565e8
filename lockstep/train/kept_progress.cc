#include "lockstep/train/kept_progress.h"

#include <fmt/format.h>

#include <atomic>
#include <cstring>
#include <type_traits>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

static_assert(std::is_trivially_copyable_v<EpochSummary>);
constexpr std::size_t kLine = 64;

std::atomic_ref<std::uint64_t> count_in(std::span<std::byte> log) {
  LOCKSTEP_CHECK(log.size() >= kLine);
  return std::atomic_ref(*reinterpret_cast<std::uint64_t*>(log.data()));
}

std::byte* entry(std::span<std::byte> log, std::size_t epoch) {
  return log.subspan(kLine + epoch * sizeof(EpochSummary), sizeof(EpochSummary)).data();
}

}  // namespace

StepNote note_of(const Progress& progress) {
  return {.step = progress.step,
          .samples = progress.samples,
          .epochs = progress.epochs.size(),
          .step_of_epoch = progress.step_of_epoch,
          .loss = progress.loss,
          .weight = progress.weight,
          .seconds = progress.seconds,
          .gradient_norm = progress.gradient_norm};
}

std::size_t epoch_log_bytes(std::int64_t epochs) {
  return kLine + static_cast<std::size_t>(epochs) * sizeof(EpochSummary);
}

// The count last: who sees it sees the summaries.
void write_log(std::span<std::byte> log, const std::vector<EpochSummary>& epochs) {
  const std::uint64_t before = count_in(log).load();
  for (std::size_t i = std::min<std::size_t>(before, epochs.size()); i < epochs.size(); ++i)
    std::memcpy(entry(log, i), &epochs[i], sizeof(EpochSummary));
  count_in(log).store(epochs.size());
}

Progress progress_from(std::span<const std::byte> bytes, std::span<std::byte> log) {
  StepNote note;
  LOCKSTEP_CHECK(bytes.size() == sizeof note);
  std::memcpy(&note, bytes.data(), sizeof note);
  const std::uint64_t over = count_in(log).load();
  if (over > (log.size() - kLine) / sizeof(EpochSummary) ||
      (over != note.epochs && over != note.epochs + 1))
    throw Error(
        fmt::format("the run's progress in shared memory is damaged: {} epochs are over, "
                    "{} before step {}",
                    over, note.epochs, note.step));
  Progress progress{.step = note.step,
                    .samples = note.samples,
                    .gradient_norm = note.gradient_norm,
                    .epochs = std::vector<EpochSummary>(over)};
  for (std::size_t i = 0; i < over; ++i)
    std::memcpy(&progress.epochs[i], entry(log, i), sizeof(EpochSummary));
  if (over != note.epochs) return progress;
  progress.step_of_epoch = note.step_of_epoch;
  progress.loss = note.loss;
  progress.weight = note.weight;
  progress.seconds = note.seconds;
  return progress;
}

}  // namespace lockstep
