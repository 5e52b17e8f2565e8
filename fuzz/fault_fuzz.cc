// A list of faults, as of --inject-file. What is read must read back the same from its own text.
#include <cstdint>
#include <string>
#include <vector>

#include "fuzz/target.h"
#include "lockstep/base/error.h"
#include "lockstep/cluster/faults.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  lockstep::fuzz::expect_config_error([&] {
    const std::vector<lockstep::Fault> faults = lockstep::faults_from_text(text);
    LOCKSTEP_CHECK(lockstep::faults_from_text(lockstep::to_text(faults)) == faults);
  });
  lockstep::fuzz::expect_config_error([&] {
    const std::vector<std::string> lines = {text};
    for (const lockstep::TimedKills& kills : lockstep::parse_faults(lines, 3).timed)
      lockstep::KillTimer(kills).due({}, 3);
  });
  return 0;
}
