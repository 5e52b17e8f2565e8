#include "lockstep/base/error.h"
#include "lockstep/collective/nccl_group.h"

namespace lockstep {

std::string nccl_unavailable() { return "this build found no CUDA toolkit or no nccl.h"; }

std::unique_ptr<Group> make_nccl_group(std::shared_ptr<Group>, const GroupOptions&) {
  throw ConfigError("no group of CUDA devices: " + nccl_unavailable(),
                    "install both, or name NCCL's folder with -DLOCKSTEP_NCCL_PREFIX, and build "
                    "again");
}

}  // namespace lockstep
