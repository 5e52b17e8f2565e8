// Gradient clipping, as torch::nn::utils::clip_grad_norm_, with fixed bits: the norm is added up in
// double precision by tiles of 1,024 elements in order, whatever the number of threads and the
// instruction set. After a backward() of data_parallel all ranks have the same gradients, and so
// find the same norm, without talking to each other.
//
// Threads: as for the gradients.
#pragma once

#include <vector>

namespace at {
class Tensor;
}

namespace lockstep {

// Scales the gradients by max_norm / (norm + 1e-6) if that is below 1, in place; returns the norm
// of all of them as one vector, before that. norm_type: above 0; infinity: the largest magnitude.
// Throws Error, and changes nothing, where error_if_nonfinite and the norm is not finite: names the
// first such gradient. ConfigError for a norm_type or max_norm out of range.
double clip_grad_norm_(const std::vector<at::Tensor>& parameters, double max_norm,
                       double norm_type = 2.0, bool error_if_nonfinite = false);

}  // namespace lockstep
