#include "lockstep/bridge/autocast.h"

#include <ATen/autocast_mode.h>

namespace lockstep {

namespace autocast = at::autocast;

Autocast::Autocast(Precision precision) : active_(precision == Precision::bf16) {
  if (!active_) return;
  was_enabled_ = autocast::is_autocast_enabled(at::kCPU);
  previous_type_ = static_cast<int>(autocast::get_autocast_dtype(at::kCPU));
  autocast::set_autocast_enabled(at::kCPU, true);
  autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  autocast::increment_nesting();
}

Autocast::~Autocast() {
  if (!active_) return;
  if (autocast::decrement_nesting() == 0) autocast::clear_cache();
  autocast::set_autocast_dtype(at::kCPU, static_cast<at::ScalarType>(previous_type_));
  autocast::set_autocast_enabled(at::kCPU, was_enabled_);
}

}  // namespace lockstep
