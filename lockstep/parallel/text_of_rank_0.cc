#include "lockstep/parallel/text_of_rank_0.h"

#include "lockstep/base/error.h"

namespace lockstep {

std::string text_of_rank_0(const World& world, const std::function<std::string()>& make) {
  std::string text, failure;
  if (world.rank() == 0) {
    try {
      text = make();
    } catch (const ConfigError& error) {
      failure = error.what();
    }
  }
  std::uint64_t sizes[2] = {text.size(), failure.size()};
  world.group().broadcast(std::as_writable_bytes(std::span(sizes)), Dtype::int64, 0,
                          {.tag = "what rank 0 says"});
  std::string& sent = sizes[1] > 0 ? failure : text;
  sent.resize(sizes[1] > 0 ? sizes[1] : sizes[0]);
  if (!sent.empty())
    world.group().broadcast(std::as_writable_bytes(std::span(sent)), Dtype::uint8, 0,
                            {.tag = "what rank 0 says"});
  if (!failure.empty()) throw ConfigError(failure);
  return text;
}

}  // namespace lockstep
