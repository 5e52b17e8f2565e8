#include "lockstep/transport/transport.h"

#include <fmt/format.h>

#include "lockstep/job/nearest.h"
#include "lockstep/transport/engines.h"

namespace lockstep {

std::string_view name_of(Engine engine) {
  switch (engine) {
    case Engine::ucx:
      return "ucx";
    case Engine::mpi:
      return "mpi";
    case Engine::zmq:
      return "zmq";
  }
  LOCKSTEP_CHECK(false, "no such engine");
  return "";
}

Engine engine_from(std::string_view name) {
  std::vector<std::string> names;
  for (const Engine engine : {Engine::ucx, Engine::mpi, Engine::zmq}) {
    if (name == name_of(engine)) return engine;
    names.emplace_back(name_of(engine));
  }
  const std::string near = nearest(name, names);
  throw ConfigError(
      fmt::format("no engine '{}'", name),
      near.empty() ? "one of ucx, mpi, zmq" : fmt::format("did you mean '{}'?", near));
}

std::string unavailable(Engine engine) {
  switch (engine) {
    case Engine::ucx:
      return ucx_unavailable();
    case Engine::mpi:
      return mpi_unavailable();
    case Engine::zmq:
      return "";
  }
  return "";
}

std::unique_ptr<Endpoint> make_endpoint(Engine engine, const EndpointOptions& options) {
  if (const std::string why = unavailable(engine); !why.empty()) throw ConfigError(why);
  switch (engine) {
    case Engine::ucx:
      return make_ucx_endpoint(options);
    case Engine::mpi:
      return make_mpi_endpoint();
    case Engine::zmq:
      return make_zmq_endpoint(options);
  }
  return nullptr;
}

}  // namespace lockstep
