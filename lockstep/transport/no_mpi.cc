#include "lockstep/transport/engines.h"

namespace lockstep {

std::string mpi_unavailable() {
  return "this build has no MPI: install libopenmpi-dev (or another MPI with mpicc), then "
         "configure "
         "and build again";
}
std::unique_ptr<Endpoint> make_mpi_endpoint() {
  return nullptr;  // nobody makes what is unavailable
}
std::vector<std::string> exchange_by_mpi(const std::string&) {
  throw ConfigError(mpi_unavailable());
}

}  // namespace lockstep
