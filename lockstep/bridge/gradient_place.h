// One parameter's gradient inside a flat memory: how it gets there after a backward, and back into
// .grad after a reduction in place.
//
// Whoever keeps a gradient keeps its values: a tensor that still shows this memory when the next
// gradient arrives gets memory of its own with what it showed, and a .grad that others refer to
// stays the same tensor and receives the reduced values.
//
// The caller owns the memory. Threads: as for the parameter.
#pragma once

#include <memory>
#include <span>

#include "lockstep/bridge/flat_parameters.h"

namespace lockstep {

class GradientPlace {
 public:
  // The place of an entry of `layout` in `memory`; `keep` lives as long as any .grad that shows it.
  GradientPlace(at::Tensor parameter, std::span<std::byte> memory, const ParameterLayout& layout,
                std::size_t entry, std::shared_ptr<void> keep);

  const at::Tensor& parameter() const { return parameter_; }
  // Shows the memory until the next collect() or clear().
  const at::Tensor& view() const { return view_; }

  // .grad, or zeros where it is undefined, into the memory. Costs nothing where it lies there.
  // in_hook: called by the parameter's post-accumulate hook, while backward runs.
  void collect(bool in_hook = false);
  void clear();  // zeros into the memory, whatever .grad is
  // .grad shows what the memory holds now. Not while backward runs.
  void hand_out();

 private:
  bool shown_by(const at::Tensor& gradient) const;
  static bool is_fresh(const at::Tensor& gradient, bool in_hook);
  void release();
  at::Tensor make_view() const;

  at::Tensor parameter_;
  std::span<std::byte> memory_;
  std::vector<std::int64_t> shape_;
  at::ScalarType type_;
  std::shared_ptr<void> keep_;
  at::Tensor view_;
  at::Tensor kept_;  // .grad, where others may refer to it
};

}  // namespace lockstep
