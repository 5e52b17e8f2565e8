// How the local ranks of a job without an agent come to share one segment: local rank 0 makes it
// and passes its descriptor to the others over an abstract Unix socket named from the user and the
// job. Both sides check that the other is the same user. The descriptor goes out only when all have
// come and agree about the job, so that two jobs of one name are refused and never mixed.
#pragma once

#include <memory>

#include "lockstep/base/deadline.h"
#include "lockstep/base/file.h"
#include "lockstep/cluster/environment.h"

namespace lockstep {

class Segment;

struct SharedSegment {
  std::shared_ptr<Segment> segment;
  UniqueFd name;  // local rank 0: keeps the job's name taken as long as it is held
};

// Throws CommError: who did not come, or who came that does not belong here.
SharedSegment exchange_segment(const Place& place, const Deadline& deadline);

}  // namespace lockstep
