#include "lockstep/cluster/recoveries.h"

#include <algorithm>

namespace lockstep {
namespace {

constexpr auto kRejoinPatience = std::chrono::seconds(10);

}  // namespace

Recoveries::Loss Recoveries::loss_of(int rank, const std::string& cause,
                                     Clock::time_point now) const {
  return {.rank = rank,
          .cause = cause,
          .clock = clock_of(now),
          .generation = generation_->number,
          .members = generation_->members.size(),
          .recovery = nullptr};
}

void Recoveries::lost(int rank, const std::string& cause, Clock::time_point now) {
  losses_.push_back(loss_of(rank, cause, now));
}

void Recoveries::published(const GenerationPtr& generation) {
  generation_ = generation;
  first_step_ = std::nullopt;
  // Nobody died, and yet all begin again.
  if (generation->at_once() && failure_.rank >= 0 &&
      failure_.generation + 1 == generation->number &&
      std::ranges::none_of(losses_, [&](const Loss& loss) { return loss.recovery.is_null(); }))
    losses_.push_back(failure_);
}

void Recoveries::says(int rank, const nlohmann::json& event, Clock::time_point now) {
  const std::string& name = event.at("event").get_ref<const std::string&>();
  if (name == "comm_error") {
    const std::uint64_t generation = event.at("generation");
    if (generation_ && generation == generation_->number &&
        (failure_.rank < 0 || failure_.generation < generation))
      failure_ = loss_of(rank, event.at("message"), now);
  } else if (name == "recovered") {
    recovered(event);
  } else if (name == "step") {
    step_ = event.at("step");
  } else if (name == "first_step") {
    step_ = first_step_ = 1;
  }
}

void Recoveries::recovered(const nlohmann::json& event) {
  const std::uint64_t generation = event.at("generation");
  const double clock = event.at("clock");
  step_ = event.at("step");
  const bool newest = generation_ && generation_->number == generation;
  if (newest) first_step_ = step_;
  for (Loss& loss : losses_) {
    if (generation <= loss.generation) continue;
    if (loss.recovery.is_null())
      loss.recovery = {{"event", "recovery"},          {"rank", loss.rank},
                       {"cause", loss.cause},          {"seconds", clock - loss.clock},
                       {"step", event.at("step")},     {"steps_redone", event.at("steps_redone")},
                       {"source", event.at("source")}, {"generation", generation},
                       {"rejoined_seconds", nullptr}};
    if (newest && generation_->members.size() >= loss.members)
      loss.recovery["rejoined_seconds"] = clock - loss.clock;
  }
  tell(Clock::time_point::min());
}

void Recoveries::tell(Clock::time_point now) {
  std::erase_if(losses_, [&](Loss& loss) {
    if (loss.recovery.is_null()) return false;
    const bool late =
        now == Clock::time_point::max() || clock_of(now) > loss.clock + seconds(kRejoinPatience);
    if (loss.recovery["rejoined_seconds"].is_null() && !late) return false;
    emit_(loss.recovery);
    return true;
  });
}

}  // namespace lockstep
