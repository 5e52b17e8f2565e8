#include "lockstep/transport/engines.h"

namespace lockstep {

std::string ucx_unavailable() {
  return "this build has no UCX: install libucx-dev (ucx.org), then configure and build again";
}
std::unique_ptr<Endpoint> make_ucx_endpoint(const EndpointOptions&) {
  return nullptr;  // nobody makes what is unavailable
}

}  // namespace lockstep
