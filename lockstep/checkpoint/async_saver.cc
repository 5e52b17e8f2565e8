#include "lockstep/checkpoint/async_saver.h"

#include <fmt/format.h>

#include <cstring>

#include "lockstep/base/error.h"

namespace lockstep {

void AsyncSaver::save(const CheckpointContents& contents,
                      std::optional<std::vector<std::uint64_t>> keep_also, Deadline deadline) {
  wait(deadline);
  if (keep_also) options_.keep_also = std::move(*keep_also);
  copy_ = contents;
  std::size_t bytes = 0;
  for (const TensorView& tensor : contents.tensors) bytes += tensor.bytes.size();
  memory_.resize(bytes);
  std::size_t used = 0;
  for (TensorView& tensor : copy_.tensors) {
    const auto home = std::span(memory_).subspan(used, tensor.bytes.size());
    if (!home.empty()) std::memcpy(home.data(), tensor.bytes.data(), home.size());
    tensor.bytes = home;
    used += home.size();
  }
  in_flight_ =
      std::async(std::launch::async, [this] { write_checkpoint(folder_, copy_, options_); });
}

void AsyncSaver::wait(Deadline deadline) {
  if (!in_flight_.valid()) return;
  if (!deadline.is_never() &&
      in_flight_.wait_for(deadline.remaining()) != std::future_status::ready)
    throw Error(fmt::format("the checkpoint of step {} is still being written to {}", copy_.step,
                            folder_.string()));
  in_flight_.get();
}

}  // namespace lockstep
