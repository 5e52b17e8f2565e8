#include "lockstep/bridge/store.h"

#include <fmt/format.h>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "lockstep/base/error.h"

namespace lockstep {

std::vector<std::string> exchange_over_store(const StoreAddress& address, const std::string& name,
                                             int rank, int size, const std::string& mine,
                                             Clock::duration timeout) {
  const Deadline deadline = Deadline::after(timeout);
  const auto left = [&] {
    return std::chrono::duration_cast<std::chrono::milliseconds>(deadline.remaining()) +
           std::chrono::milliseconds(1);
  };
  std::vector<std::string> all;
  try {
    c10d::TCPStoreOptions options;
    options.port = address.port;
    options.timeout = left();
    c10d::TCPStore store(address.host, options);
    const auto key = [&](int of) { return fmt::format("lockstep/{}/{}", name, of); };
    store.set(key(rank), std::vector<std::uint8_t>(mine.begin(), mine.end()));
    for (int other = 0; other < size; ++other) {
      store.wait({key(other)}, left());
      const std::vector<std::uint8_t> bytes = store.get(key(other));
      all.emplace_back(bytes.begin(), bytes.end());
    }
  } catch (const std::exception& error) {
    const std::string what = error.what();
    throw CommError(fmt::format("the store at {}:{}: rank {} did not come within {:.0f} s: {}",
                                address.host, address.port, all.size(), seconds(timeout),
                                what.substr(0, what.find('\n'))));
  }
  return all;
}

}  // namespace lockstep
