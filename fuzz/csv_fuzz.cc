// CSV text under every kind of reading.
#include <cmath>
#include <cstdint>
#include <string>

#include "fuzz/target.h"
#include "lockstep/base/error.h"
#include "lockstep/data/dataset.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  for (int variant = 0; variant < 4; ++variant) {
    lockstep::CsvOptions options{.target = "y"};
    options.classification = variant % 2;
    options.target_optional = variant / 2;
    options.delimiter = variant == 3 ? ' ' : ',';
    lockstep::fuzz::expect_config_error([&] {
      const lockstep::Dataset table = lockstep::parse_csv(text, "input", options);
      LOCKSTEP_CHECK(table.rows > 0);
      LOCKSTEP_CHECK(table.values.size() ==
                     table.rows * static_cast<std::size_t>(table.sample_size()));
      for (const float value : table.values) LOCKSTEP_CHECK(std::isfinite(value));
      for (const std::int64_t c : table.classes) LOCKSTEP_CHECK(c >= 0 && c < table.class_count);
    });
  }
  return 0;
}
