#include "lockstep/parallel/torchrun.h"

#include <charconv>

#include "lockstep/base/error.h"
#include "lockstep/bridge/store.h"

namespace lockstep {

std::vector<std::string> exchange_over_torchrun(const Place& place, const std::string& mine) {
  const Environment environment = process_environment();
  const auto port = environment.find("MASTER_PORT");
  StoreAddress store{.host = place.master, .port = 0};
  if (store.host.empty() || port == environment.end() ||
      std::from_chars(port->second.data(), port->second.data() + port->second.size(), store.port)
              .ec != std::errc())
    throw ConfigError("environment: MASTER_ADDR and MASTER_PORT do not name torchrun's store",
                      "torchrun sets them");
  return exchange_over_store(store, place.job_id, place.rank, place.size, mine, kDefaultTimeout);
}

}  // namespace lockstep
