#include "lockstep/parallel/data_parallel.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/bridge/backward_hooks.h"
#include "lockstep/bridge/dtypes.h"
#include "lockstep/bridge/flat_parameters.h"

namespace lockstep {
namespace {

// --- Is it the same module on every rank? ---

std::string describe(std::string_view kind, const NamedTensor& one) {
  const at::Tensor& t = one.tensor;
  return fmt::format("{} '{}' {} [{}] on {}{}", kind, one.name, c10::toString(t.scalar_type()),
                     fmt::join(t.sizes(), ", "), t.device().str(),
                     t.requires_grad() ? " with gradient" : "");
}

using Digest = std::array<char, 64>;
Digest digest_of(std::string_view text) {
  Digest digest;
  const std::string hex = sha256_hex(std::as_bytes(std::span(text)));
  std::copy_n(hex.begin(), digest.size(), digest.begin());
  return digest;
}

// Every rank's `mine`, in order of rank.
template <typename T>
std::vector<T> gather(Group& group, std::span<const T> mine, std::string_view tag) {
  std::vector<T> all(mine.size() * static_cast<std::size_t>(group.size()));
  group.all_gather(std::as_bytes(mine), std::as_writable_bytes(std::span(all)), Dtype::uint8,
                   {.tag = tag});
  return all;
}

// The digests of all descriptions, and how many there are.
struct Fingerprint {
  std::uint64_t count = 0;
  Digest digest{};
  bool operator==(const Fingerprint&) const = default;
};

// Finds the first description that differs between ranks and throws ConfigError with both. All
// ranks end up here together, and throw the same.
[[noreturn]] void throw_difference(Group& group, const std::vector<std::string>& descriptions,
                                   std::span<const Fingerprint> fingerprints) {
  std::uint64_t common = descriptions.size();
  for (const Fingerprint& one : fingerprints) common = std::min(common, one.count);
  std::vector<Digest> digests;
  for (std::size_t i = 0; i < common; ++i) digests.push_back(digest_of(descriptions[i]));
  std::size_t first = common;
  if (common > 0) {
    const std::vector<Digest> all = gather<Digest>(group, digests, "module description");
    for (std::size_t i = 0; i < all.size(); ++i)
      if (all[i] != all[i % common]) first = std::min<std::size_t>(first, i % common);
  }
  using Text = std::array<char, 256>;
  Text mine{};
  const std::string text = first < descriptions.size() ? descriptions[first] : "nothing there";
  std::copy_n(text.begin(), std::min(text.size(), mine.size() - 1), mine.begin());
  const std::vector<Text> texts = gather<Text>(group, {&mine, 1}, "module description");
  const auto other = std::find_if(texts.begin(), texts.end(),
                                  [&](const Text& one) { return one != texts.front(); });
  throw ConfigError(
      fmt::format("data_parallel: the module differs between ranks: rank 0 has {}, rank {} has {}",
                  texts.front().data(), other - texts.begin(),
                  other == texts.end() ? "the same" : other->data()),
      "build the same module, in the same order, on every rank");
}

void check_same_module(Group& group, std::span<const NamedTensor> parameters,
                       std::span<const NamedTensor> buffers) {
  std::vector<std::string> descriptions;
  for (const NamedTensor& one : parameters) descriptions.push_back(describe("parameter", one));
  for (const NamedTensor& one : buffers) descriptions.push_back(describe("buffer", one));
  const Fingerprint mine{descriptions.size(),
                         digest_of(fmt::format("{}", fmt::join(descriptions, "\n")))};
  const auto all = gather<Fingerprint>(group, {&mine, 1}, "module description");
  if (std::any_of(all.begin(), all.end(), [&](const auto& one) { return one != all.front(); }))
    throw_difference(group, descriptions, all);
}

void broadcast_values(Group& group, std::span<const NamedTensor> tensors) {
  const at::NoGradGuard no_grad;
  for (const NamedTensor& one : tensors) {
    if (one.tensor.layout() != at::kStrided || !one.tensor.device().is_cpu())
      throw ConfigError(
          fmt::format("data_parallel: '{}' is not a dense tensor on the CPU", one.name),
          "move the module to the CPU");
    const at::Tensor dense = one.tensor.data().contiguous();
    if (dense.nbytes() == 0) continue;
    group.broadcast(bytes_of(dense), Dtype::uint8, 0, {.tag = one.name});
    if (!one.tensor.is_contiguous()) one.tensor.data().copy_(dense);
  }
}

// --- Memory ---

// The gradients of one dtype, reduced together.
struct Bucket {
  std::vector<at::Tensor> parameters;
  ParameterLayout layout;
  std::span<std::byte> memory;
  at::Tensor flat;                // all of it
  std::vector<at::Tensor> views;  // one for each parameter
};

std::vector<Bucket> make_buckets(const World& world, std::span<const NamedTensor> parameters) {
  std::vector<Bucket> buckets;
  std::vector<std::vector<NamedTensor>> of_dtype(kDtypeCount);
  for (const NamedTensor& one : parameters) {
    const std::optional<Dtype> dtype = dtype_from(one.tensor.scalar_type());
    if (!dtype || !is_floating_point(*dtype))
      throw ConfigError(fmt::format("data_parallel: parameter '{}' is {}: it cannot be averaged",
                                    one.name, c10::toString(one.tensor.scalar_type())));
    of_dtype[static_cast<std::size_t>(*dtype)].push_back(one);
  }
  const auto keep = std::make_shared<World>(world);  // .grad may outlive the caller's world
  for (const auto& group : of_dtype) {
    if (group.empty()) continue;
    Bucket bucket;
    bucket.parameters = tensors_of(group);
    bucket.layout = make_layout(group, *dtype_from(group.front().tensor.scalar_type()));
    bucket.memory = world.group().allocate(bucket.layout.bytes(), "gradients");
    bucket.flat =
        at::from_blob(bucket.memory.data(), {static_cast<std::int64_t>(bucket.layout.total)},
                      at::TensorOptions().dtype(scalar_type_from(bucket.layout.dtype)));
    for (std::size_t i = 0; i < group.size(); ++i)
      bucket.views.push_back(view_of(bucket.memory, bucket.layout, i, keep));
    buckets.push_back(std::move(bucket));
  }
  return buckets;
}

// A module's buffers, of any types, as one message.
class BufferBroadcast {
 public:
  BufferBroadcast(Group& group, std::span<const NamedTensor> buffers) {
    ParameterLayout layout{.dtype = Dtype::uint8};
    for (const NamedTensor& one : buffers)
      layout.add(one.name, {static_cast<std::int64_t>(one.tensor.nbytes())});
    if (layout.total == 0) return;
    memory_ = group.allocate(layout.bytes(), "buffers");
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      buffers_.push_back(buffers[i].tensor);
      staged_.push_back(at::from_blob(memory_.data() + layout.entries[i].offset,
                                      buffers[i].tensor.sizes(), buffers[i].tensor.options()));
    }
  }
  void run(Group& group) {
    if (memory_.empty()) return;
    // .data(): a graph that is kept for a second backward must not see its buffers as changed.
    for (std::size_t i = 0; group.rank() == 0 && i < buffers_.size(); ++i)
      staged_[i].copy_(buffers_[i].data());
    group.broadcast(memory_, Dtype::uint8, 0, {.tag = "buffers"});
    for (std::size_t i = 0; group.rank() != 0 && i < buffers_.size(); ++i)
      buffers_[i].data().copy_(staged_[i]);
  }

 private:
  std::span<std::byte> memory_;
  std::vector<at::Tensor> buffers_;
  std::vector<at::Tensor> staged_;
};

}  // namespace

// --- A backward's end ---

struct Replica::State {
  World world;
  double weight = 1;
  std::vector<Bucket> buckets;
  std::vector<NamedTensor> frozen;
  std::optional<BufferBroadcast> buffers;
  std::vector<double> usage;  // the weight, then 1 for each parameter with a gradient
  std::optional<BackwardEnd> hooks;

  explicit State(World w) : world(std::move(w)) {}

  void average() {
    const at::NoGradGuard no_grad;
    Group& group = world.group();
    contribute();
    group.all_reduce(std::as_writable_bytes(std::span(usage)), Dtype::float64, Reduction::sum,
                     {.tag = "gradient weights"});
    const double total = usage.front();
    if (total == 0)
      throw ConfigError("data_parallel: the weight is 0 on every rank: no average exists",
                        "leave out a step that no rank has samples for");
    for (Bucket& bucket : buckets) {
      group.all_reduce(bucket.memory, bucket.layout.dtype, Reduction::sum, {.tag = "gradients"});
      bucket.flat.div_(total);
    }
    hand_out();
    if (buffers) buffers->run(group);
  }

  // This rank's gradients, times its weight, into the buckets.
  void contribute() {
    for (const auto& [name, tensor] : frozen)
      if (tensor.grad().defined())
        throw ConfigError(
            fmt::format("data_parallel: parameter '{}' has a gradient, but required none when the "
                        "module was wrapped: it would not be averaged",
                        name),
            "call data_parallel after requires_grad is set");
    usage.assign(1, weight);
    for (Bucket& bucket : buckets) {
      std::vector<at::Tensor> gradients;
      for (std::size_t i = 0; i < bucket.parameters.size(); ++i) {
        const at::Tensor& gradient = bucket.parameters[i].grad();
        if (gradient.defined() && gradient.requires_grad())
          throw ConfigError(
              fmt::format("data_parallel: the gradient of parameter '{}' has a graph of its own "
                          "(create_graph), which averaging would cut",
                          bucket.layout.entries[i].name),
              "take derivatives of gradients with torch::autograd::grad");
        gradients.push_back(gradient);
        usage.push_back(gradient.defined() ? 1 : 0);
      }
      copy_into(bucket.memory, bucket.layout, gradients);
      if (weight == 0)
        bucket.flat.zero_();  // not times 0, which keeps what is not finite
      else if (weight != 1)
        bucket.flat.mul_(weight);
    }
  }

  void hand_out() {
    std::size_t index = 1;
    for (Bucket& bucket : buckets)
      for (std::size_t i = 0; i < bucket.parameters.size(); ++i, ++index)
        if (usage[index] > 0) bucket.parameters[i].mutable_grad() = bucket.views[i];
  }
};

Replica::Replica(torch::nn::Module& module, const World& world, const DataParallelOptions& options)
    : state_(std::make_unique<State>(world)) {
  if (world.size() == 1) return;  // its gradients are the average
  const std::vector<NamedTensor> parameters = named_parameters(module);
  const std::vector<NamedTensor> buffers = named_buffers(module);
  Group& group = world.group();
  check_same_module(group, parameters, buffers);
  broadcast_values(group, parameters);
  broadcast_values(group, buffers);

  std::vector<NamedTensor> trained;
  for (const NamedTensor& one : parameters)
    (one.tensor.requires_grad() ? trained : state_->frozen).push_back(one);
  state_->buckets = make_buckets(world, trained);
  if (options.broadcast_buffers) state_->buffers.emplace(group, buffers);
  state_->hooks.emplace(parameters, [state = state_.get()] { state->average(); });
}

Replica::~Replica() = default;

void Replica::set_weight(double weight) {
  if (!std::isfinite(weight) || weight < 0)
    throw ConfigError(fmt::format("data_parallel: weight {} is out of range", weight),
                      "a weight is finite and not negative, such as the number of samples");
  state_->weight = weight;
}

}  // namespace lockstep
