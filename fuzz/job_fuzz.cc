// A job file, and the same bytes as the value of an override. What resolves must be written down so
// that it reads back the same.
#include <cstdint>
#include <string>

#include "fuzz/target.h"
#include "lockstep/base/error.h"
#include "lockstep/job/job.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto check = [](lockstep::Job job) {
    job.output.clear();
    const std::string written = lockstep::to_toml(job);
    LOCKSTEP_CHECK(lockstep::to_toml(lockstep::parse_job(written, "written")) == written);
  };
  lockstep::fuzz::expect_config_error([&] { check(lockstep::parse_job(text, "input")); });
  for (const char* key : {"data", "train.epochs", "model.widths", "optimizer.lr"})
    lockstep::fuzz::expect_config_error([&] {
      check(lockstep::parse_job("recipe = 'fashion-mnist'", "input", {{key, text, "--set"}}));
    });
  lockstep::fuzz::expect_config_error([&] {
    lockstep::parse_job("recipe = 'csv'", "input", {{text, "1", "--set"}});
  });
  return 0;
}
