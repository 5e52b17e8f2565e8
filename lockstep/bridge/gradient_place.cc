#include "lockstep/bridge/gradient_place.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include <cstring>
#include <utility>

namespace lockstep {

GradientPlace::GradientPlace(at::Tensor parameter, std::span<std::byte> memory,
                             const ParameterLayout& layout, std::size_t entry,
                             std::shared_ptr<void> keep)
    : parameter_(std::move(parameter)),
      memory_(memory.subspan(layout.entries[entry].offset * size_of(layout.dtype),
                             layout.entries[entry].count * size_of(layout.dtype))),
      shape_(layout.entries[entry].shape),
      type_(parameter_.scalar_type()),
      keep_(std::move(keep)),
      view_(make_view()) {}

// With a storage of its own, whose count then says who else shows this memory.
at::Tensor GradientPlace::make_view() const {
  return at::from_blob(
      memory_.data(), shape_, [keep = keep_](void*) {}, at::TensorOptions().dtype(type_));
}

bool GradientPlace::shown_by(const at::Tensor& gradient) const {
  return gradient.layout() == at::kStrided && gradient.is_contiguous() &&
         gradient.const_data_ptr() == memory_.data();
}

// Leaves the memory to us alone: what else shows it moves away with its values.
void GradientPlace::release() {
  if (view_.storage().use_count() == 1) return;
  const at::Tensor copy = view_.clone();
  view_.storage().set_data_ptr_noswap(copy.storage().set_data_ptr(at::DataPtr()));
  view_ = make_view();
}

// Whether nobody but autograd refers to a gradient, for certain. While its hook runs, autograd
// itself still has the buffer that it handed over; one that was there before has since been added
// to.
bool GradientPlace::is_fresh(const at::Tensor& gradient, bool in_hook) {
  const std::size_t uses = gradient.storage().use_count();
  return gradient.use_count() == 1 &&
         (uses == 1 || (in_hook && uses == 2 && gradient._version() == 0));
}

void GradientPlace::collect(bool in_hook) {
  const at::NoGradGuard no_grad;
  at::Tensor& gradient = parameter_.mutable_grad();
  kept_.reset();
  if (!gradient.defined()) return clear();
  if (shown_by(gradient)) return;
  release();
  const bool strided = gradient.layout() == at::kStrided;
  view_.copy_(strided ? gradient : gradient.to_dense());
  if (!strided || is_fresh(gradient, in_hook))
    gradient = view_.detach();  // its buffer is free for the gradients to come
  else
    kept_ = gradient;
}

void GradientPlace::clear() {
  if (const at::Tensor& gradient = parameter_.grad(); !gradient.defined() || !shown_by(gradient))
    release();
  if (!memory_.empty()) std::memset(memory_.data(), 0, memory_.size());
}

void GradientPlace::hand_out() {
  const at::NoGradGuard no_grad;
  at::Tensor& gradient = parameter_.mutable_grad();
  const at::Tensor kept = std::exchange(kept_, {});
  // Two are .grad and `kept`; autograd has let go by now.
  if (kept.defined() && gradient.is_same(kept) &&
      (kept.use_count() > 2 || kept.storage().use_count() > 1))
    gradient.copy_(view_);
  else if (!gradient.defined() || !shown_by(gradient))
    gradient = view_.detach();
}

}  // namespace lockstep
