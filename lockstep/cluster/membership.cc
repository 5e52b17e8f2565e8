#include "lockstep/cluster/membership.h"

namespace lockstep {}
