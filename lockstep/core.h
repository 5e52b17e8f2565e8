// The public header of lockstep::core, which needs no libtorch: the job seen by a worker, and
// collectives over plain memory.
#pragma once

#include "lockstep/base/error.h"
#include "lockstep/cluster/world.h"
#include "lockstep/collective/group.h"
