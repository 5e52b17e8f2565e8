// Gradients born where they are needed: the weight gradient of a Linear layer (any product with the
// transposed parameter itself) is written by the matrix product straight into its place, instead of
// into a fresh buffer that is copied there afterwards. Bits are the same.
//
// It is done where it pays, chosen by shape alone: weights of two dimensions with at least
// kDirectElements elements. Where it would be wrong, the gradient arrives in a buffer as usual: a
// .grad that is defined (a second backward, accumulation), the second use of a tied weight within
// one backward, create_graph, torch::autograd::grad, a parameter with hooks, another element type
// (autocast), a place that a tensor still shows. So .grad after backward is either a view of the
// place or a buffer; who needs it in its place copies what is not there.
//
// The caller owns the places. The parameters may outlive the DirectGradients. Threads: as for the
// parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <deque>
#include <span>
#include <vector>

#include "lockstep/bridge/flat_parameters.h"

namespace lockstep {

struct DirectPlace;

// What the buffer costs is a copy of the gradient; what the place costs is a custom node of the
// graph, one to two microseconds. At 64 KiB the copy takes longer on any machine, and larger
// buffers leave the first-level cache and come fresh from the kernel, page by page.
inline constexpr std::int64_t kDirectElements = 16384;

class DirectGradients {
 public:
  explicit DirectGradients(std::span<const at::Tensor> parameters);
  ~DirectGradients();
  DirectGradients(const DirectGradients&) = delete;
  DirectGradients& operator=(const DirectGradients&) = delete;

  // Places for the backwards to come, one a parameter, contiguous, of its parameter's shape;
  // undefined: none. A place is written only while no tensor but those given here shows it.
  void set_places(std::span<const at::Tensor> places);
  // Entry i of the layout is parameter i's place.
  void set_places(std::span<std::byte> memory, const ParameterLayout& layout);

 private:
  struct Weight {
    std::size_t index;  // among the parameters
    at::Tensor parameter;
    DirectPlace* direct;
  };
  std::size_t parameters_ = 0;
  std::vector<Weight> weights_;
  std::deque<DirectPlace> places_;  // hooks point to them
};

}  // namespace lockstep
