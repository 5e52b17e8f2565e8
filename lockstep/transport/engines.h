// The engines that transport.cc chooses among. Each is in a file of its own, or, where the build
// has found none, in no_ENGINE.cc, which says so. Any thread.
#pragma once

#include <memory>
#include <string>

#include "lockstep/transport/transport.h"

namespace lockstep {

std::string ucx_unavailable();
std::unique_ptr<Endpoint> make_ucx_endpoint(const EndpointOptions& options);
std::string mpi_unavailable();
std::unique_ptr<Endpoint> make_mpi_endpoint();
std::unique_ptr<Endpoint> make_zmq_endpoint(const EndpointOptions& options);

}  // namespace lockstep
