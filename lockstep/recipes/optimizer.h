// A job's optimizer as the update layer knows it. Pure; any thread.
#pragma once

#include "lockstep/job/job.h"
#include "lockstep/update/optimizer.h"

namespace lockstep {

// Not for "closed_form", which takes no steps.
OptimizerOptions optimizer_options(const OptimizerSettings& settings);

}  // namespace lockstep
