// Shared weights whose header, words and records a hostile holder wrote: attaching, reading the
// record, recovering and committing may refuse, but never fault.
#include <cstring>
#include <vector>

#include "fuzz/target.h"
#include "lockstep/update/recovery.h"

namespace {

using namespace lockstep;

UpdateSpec make_spec() {
  return {.elements = 3000,
          .groups = {Adam{}, SGD{.momentum = 0.9}},
          .ranges = {{0, 2000, 0}, {2000, 2900, 1}, {2900, 3000, UpdateRange::kAverage}}};
}

// The input is a list of (place, eight bytes that are written there).
void overwrite(std::span<std::byte> memory, std::span<const std::uint8_t> input) {
  for (; input.size() >= 12; input = input.subspan(12)) {
    std::uint32_t place = 0;
    std::memcpy(&place, input.data(), sizeof place);
    std::memcpy(memory.data() + place % (memory.size() / 8) * 8, input.data() + sizeof place, 8);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const UpdateSpec spec = make_spec();
  const SharedLayout layout = SharedLayout::of(spec, 3, 8);
  static std::vector<std::byte> room(layout.total_bytes() + 64);
  std::fill(room.begin(), room.end(), std::byte{0});
  const std::span memory(
      room.data() + (64 - reinterpret_cast<std::uintptr_t>(room.data()) % 64) % 64,
      layout.total_bytes());
  const auto genuine = SharedState::create(memory, spec, layout, first_record(spec));
  const std::vector<VirtualRange> runs = {{0, 2}, {2, 3}, {3, 4}};
  const std::vector<VirtualLoss> losses(4, {.sum = 1, .weight = 2});
  genuine.decide(plan_step(spec, first_record(spec),
                           {.groups = spec.groups, .runs = runs, .losses = losses, .slices = 3}));
  overwrite(memory.first(layout.weights_offset()), {data, size});

  static const std::vector<float> slots(2 * 3072, 1.0f);
  const std::vector<std::span<const float>> ranks(3, slots);
  try {
    const SharedState state = SharedState::attach(memory);
    if (state.layout() != layout) return 0;
    SliceUpdate update(spec, state);
    const RecoveryState found = recovery_state(state, spec);
    const RecoveryPlan plan = plan_recovery(found, 2);
    for (const std::size_t me : {0, 1}) recover(update, plan, me, {.ranks = ranks, .stride = 3072});
    if (plan.action == RecoveryPlan::Action::finish)
      state.commit(state.record(found.decided, spec));
  } catch (const Error&) {
  }
  return 0;
}
