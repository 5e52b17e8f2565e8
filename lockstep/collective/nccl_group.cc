#include "lockstep/collective/nccl_group.h"

#include <cuda_runtime.h>
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/collective/call.h"
#include "lockstep/collective/endable.h"

namespace lockstep {
namespace {

constexpr Clock::duration kLook = std::chrono::microseconds(20);
constexpr Clock::duration kForever = std::chrono::hours(24 * 365);

void check(cudaError_t status, std::string_view what) {
  if (status != cudaSuccess)
    throw CommError(fmt::format("cuda: {}: {}", what, cudaGetErrorString(status)));
}

ncclDataType_t type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return ncclFloat64;
    case Dtype::float32:
      return ncclFloat32;
    case Dtype::float16:
      return ncclFloat16;
    case Dtype::bfloat16:
      return ncclBfloat16;
    case Dtype::int8:
      return ncclInt8;
    case Dtype::int32:
      return ncclInt32;
    case Dtype::int64:
      return ncclInt64;
    case Dtype::uint8:
      return ncclUint8;
  }
  LOCKSTEP_CHECK(false, "no such dtype");
  return ncclUint8;
}

ncclRedOp_t operation_of(Reduction reduction) {
  constexpr ncclRedOp_t kOperations[] = {ncclSum, ncclAvg, ncclMin, ncclMax, ncclProd};
  return kOperations[static_cast<int>(reduction)];
}

class NcclGroup final : public Group {
 public:
  NcclGroup(std::shared_ptr<Group> host, const GroupOptions& options)
      : host_(std::move(host)), options_(options) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
    ncclUniqueId id{};
    if (rank() == 0) did(ncclGetUniqueId(&id), "an id");
    host_->broadcast(std::as_writable_bytes(std::span(&id, 1)), Dtype::uint8, 0, {.tag = "nccl"});
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;  // so that every wait has a deadline
    deadline_ = after(options.timeout);
    did(ncclCommInitRankConfig(&nccl_, size(), id, rank(), &config), "joining");
  }
  ~NcclGroup() override {
    if (nccl_ != nullptr) ncclCommAbort(nccl_);
    for (void* memory : memory_) cudaFree(memory);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::uint64_t generation() const override { return host_->generation(); }
  GroupStatistics statistics() const override { return statistics_; }
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) override {
    void* memory = nullptr;
    if (cudaMalloc(&memory, std::max<std::size_t>(bytes, 1)) != cudaSuccess)
      throw Error(fmt::format("cannot allocate {} bytes of the device for {}", bytes, what));
    memory_.push_back(memory);
    check(cudaMemset(memory, 0, bytes), what);
    return {static_cast<std::byte*>(memory), bytes};
  }

  void barrier(const CallOptions& options) override {
    run({.operation = Operation::barrier}, options, 0, [] {});
  }
  void broadcast(std::span<std::byte> data, Dtype dtype, int root,
                 const CallOptions& options) override {
    const std::uint64_t count = count_elements(data, dtype, Operation::broadcast);
    check_root(root, size(), Operation::broadcast);
    run({.operation = Operation::broadcast, .dtype = dtype, .root = root, .count = count}, options,
        data.size(), [&] {
          did(ncclBroadcast(data.data(), data.data(), data.size(), ncclUint8, root, nccl_, stream_),
              "broadcast");
        });
  }
  void all_gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options) override {
    const std::uint64_t count = count_elements(input, dtype, Operation::all_gather);
    check_parts(input, output, size(), rank(), Operation::all_gather);
    run({.operation = Operation::all_gather, .dtype = dtype, .count = count}, options, input.size(),
        [&] {
          did(ncclAllGather(input.data(), output.data(), input.size(), ncclUint8, nccl_, stream_),
              "all_gather");
        });
  }
  void all_gather_uneven(std::span<const std::byte> input, std::span<std::byte> output,
                         std::span<const std::uint64_t> counts, Dtype dtype,
                         const CallOptions& options) override {
    const UnevenParts parts = check_all_gather_uneven(input, output, counts, dtype, size(), rank());
    run({.operation = Operation::all_gather_uneven,
         .dtype = dtype,
         .count = output.size() / size_of(dtype),
         .layout = parts.digest},
        options, input.size(), [&] {
          exchange([&](int) { return input; },
                   [&](int from) {
                     return output.subspan(parts.begins[from],
                                           parts.begins[from + 1] - parts.begins[from]);
                   });
        });
  }
  void gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
              const CallOptions& options) override {
    const std::uint64_t count = count_elements(input, dtype, Operation::gather);
    check_root(root, size(), Operation::gather);
    const bool is_root = rank() == root;
    if (is_root) check_parts(input, output, size(), rank(), Operation::gather);
    run({.operation = Operation::gather, .dtype = dtype, .root = root, .count = count}, options,
        input.size(), [&] {
          exchange([&](int to) { return to == root ? input : std::span<const std::byte>(); },
                   [&](int from) {
                     return is_root ? output.subspan(from * input.size(), input.size())
                                    : std::span<std::byte>();
                   });
        });
  }
  void scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
               const CallOptions& options) override {
    const std::uint64_t count = count_elements(output, dtype, Operation::scatter);
    check_root(root, size(), Operation::scatter);
    const bool is_root = rank() == root;
    if (is_root) check_parts(output, input, size(), rank(), Operation::scatter);
    run({.operation = Operation::scatter, .dtype = dtype, .root = root, .count = count}, options,
        is_root ? input.size() : output.size(), [&] {
          exchange(
              [&](int to) {
                return is_root ? input.subspan(to * output.size(), output.size())
                               : std::span<const std::byte>();
              },
              [&](int from) { return from == root ? output : std::span<std::byte>(); });
        });
  }
  void all_to_all(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options) override {
    const std::size_t part = check_all_to_all(input, output, dtype, size());
    run({.operation = Operation::all_to_all, .dtype = dtype, .count = part / size_of(dtype)},
        options, input.size(), [&] {
          exchange([&](int to) { return input.subspan(to * part, part); },
                   [&](int from) { return output.subspan(from * part, part); });
        });
  }
  void all_to_all_uneven(std::span<const std::byte> input,
                         std::span<const std::uint64_t> input_counts, std::span<std::byte> output,
                         std::span<const std::uint64_t> output_counts, Dtype dtype,
                         const CallOptions& options) override {
    constexpr auto kOperation = Operation::all_to_all_uneven;
    check_counts(input_counts, input, dtype, size(), kOperation);
    check_counts(output_counts, output, dtype, size(), kOperation);
    check_apart(input, output, kOperation);
    std::vector<std::uint64_t> theirs(size());
    run({.operation = kOperation, .dtype = dtype, .own = input.size()}, options, input.size(), [&] {
      host_->all_to_all(std::as_bytes(input_counts), std::as_writable_bytes(std::span(theirs)),
                        Dtype::int64, {.tag = options.tag});
      if (!std::ranges::equal(theirs, output_counts))
        throw Error("other counts come to this rank than it expects");
      std::size_t read = 0, written = 0;
      exchange(
          [&](int to) {
            const std::size_t bytes = input_counts[to] * size_of(dtype);
            return input.subspan(std::exchange(read, read + bytes), bytes);
          },
          [&](int from) {
            const std::size_t bytes = output_counts[from] * size_of(dtype);
            return output.subspan(std::exchange(written, written + bytes), bytes);
          });
    });
  }

  void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                  const CallOptions& options) override {
    const std::uint64_t count = count_elements(data, dtype, Operation::all_reduce);
    run({.operation = Operation::all_reduce,
         .dtype = dtype,
         .reduction = reduction,
         .count = count},
        options, data.size(), [&] {
          if (goes_by_host(dtype, reduction))
            return by_host(data, data, [&](std::span<std::byte> in, std::span<std::byte> out) {
              host_->all_reduce(in, dtype, reduction, options);
              std::ranges::copy(in, out.begin());
            });
          did(ncclAllReduce(data.data(), data.data(), count, type_of(dtype),
                            operation_of(reduction), nccl_, stream_),
              "all_reduce");
        });
  }
  void reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction, int root,
              const CallOptions& options) override {
    const std::uint64_t count = count_elements(data, dtype, Operation::reduce);
    check_root(root, size(), Operation::reduce);
    run({.operation = Operation::reduce,
         .dtype = dtype,
         .reduction = reduction,
         .root = root,
         .count = count},
        options, data.size(), [&] {
          if (goes_by_host(dtype, reduction))
            return by_host(data, data, [&](std::span<std::byte> in, std::span<std::byte> out) {
              host_->reduce(in, dtype, reduction, root, options);
              std::ranges::copy(in, out.begin());
            });
          did(ncclReduce(data.data(), data.data(), count, type_of(dtype), operation_of(reduction),
                         root, nccl_, stream_),
              "reduce");
        });
  }
  void reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                      Reduction reduction, const CallOptions& options) override {
    const std::uint64_t count = count_elements(output, dtype, Operation::reduce_scatter);
    check_parts(output, input, size(), -1, Operation::reduce_scatter);
    run({.operation = Operation::reduce_scatter,
         .dtype = dtype,
         .reduction = reduction,
         .count = count},
        options, input.size(), [&] {
          if (goes_by_host(dtype, reduction))
            return by_host(input, output, [&](std::span<std::byte> in, std::span<std::byte> out) {
              host_->reduce_scatter(in, out, dtype, reduction, options);
            });
          did(ncclReduceScatter(input.data(), output.data(), count, type_of(dtype),
                                operation_of(reduction), nccl_, stream_),
              "reduce_scatter");
        });
  }
  // Of many contributions a rank, whose order is the point: by the host.
  void tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                       const TreeLayout& layout, const CallOptions& options) override {
    count_elements(result, dtype, Operation::tree_all_reduce);
    check_layout(layout, size());
    std::size_t most = 1;
    for (const VirtualRange run : layout.runs)
      most = std::max(most, maximal_subtrees(run, layout.virtual_ranks).size());
    const std::size_t own = maximal_subtrees(layout.runs[rank()], layout.virtual_ranks).size();
    check_tree(slots, result, dtype, own);
    if (host_slots_.size() < most * result.size())
      host_slots_ = host_->allocate(most * result.size(), "gradients on their way");
    const auto copies = host_slots_.first(own * result.size());
    const auto sum = host_slots_.first(result.size());
    run({.operation = Operation::tree_all_reduce,
         .dtype = dtype,
         .virtual_ranks = layout.virtual_ranks,
         .count = result.size() / size_of(dtype)},
        options, result.size(), [&] {
          copy(copies.data(), slots.data(), copies.size(), cudaMemcpyDeviceToHost);
          host_->tree_all_reduce(host_slots_, sum, dtype, layout, options);
          copy(result.data(), sum.data(), sum.size(), cudaMemcpyHostToDevice);
        });
  }

  void send(std::span<const std::byte> data, Dtype dtype, int destination,
            const CallOptions& options) override {
    const std::uint64_t count = count_elements(data, dtype, Operation::send);
    check_peer(destination, rank(), size(), Operation::send);
    guarded(options, data.size(), [&] {
      host_->send(std::as_bytes(std::span(&count, 1)), Dtype::int64, destination, options);
      did(ncclSend(data.data(), data.size(), ncclUint8, destination, nccl_, stream_), "send");
    });
  }
  void recv(std::span<std::byte> data, Dtype dtype, int source,
            const CallOptions& options) override {
    const std::uint64_t count = count_elements(data, dtype, Operation::recv);
    check_peer(source, rank(), size(), Operation::recv);
    guarded(options, data.size(), [&] {
      std::uint64_t theirs = 0;
      host_->recv(std::as_writable_bytes(std::span(&theirs, 1)), Dtype::int64, source, options);
      if (theirs != count)
        throw Error(fmt::format("rank {} sends {} elements, rank {} expects {}", source, theirs,
                                rank(), count));
      did(ncclRecv(data.data(), data.size(), ncclUint8, source, nccl_, stream_), "recv");
    });
  }
  std::unique_ptr<Group> split(int color, int key, const CallOptions& options) override {
    auto part = host_->split(color, key, options);
    return part ? std::make_unique<NcclGroup>(std::move(part), options_) : nullptr;
  }

 private:
  static Deadline after(Clock::duration timeout) {
    return timeout < kForever ? Deadline::after(timeout) : Deadline::never();
  }
  bool goes_by_host(Dtype dtype, Reduction reduction) const {
    return is_floating_point(dtype) ? options_.exact : reduction == Reduction::mean;
  }

  // A collective: the ranks' calls are compared by the host's group.
  template <typename Body>
  void run(const Call& call, const CallOptions& options, std::uint64_t bytes, Body&& body) {
    guarded(options, bytes, [&] {
      Call made = call;
      made.sequence = next_sequence_++;
      const CallWords mine = pack(made);
      std::vector<CallWords> all(size());
      host_->all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)),
                        Dtype::uint8, {.tag = options.tag, .timeout = options.timeout});
      std::vector<std::string> texts;
      for (const CallWords& words : all) texts.push_back(describe(unpack(words)));
      for (const CallWords& words : all)
        if (!same_fingerprint(words, mine)) throw Error(describe_difference(texts));
      body();
    });
  }
  template <typename Body>
  void guarded(const CallOptions& options, std::uint64_t bytes, Body&& body) {
    if (!over_.empty()) throw CommError("this group ended with: " + over_);
    const auto began = Clock::now();
    deadline_ = after(options.timeout.value_or(options_.timeout));
    try {
      body();
      finish();
    } catch (const std::exception& error) {
      over_ = fmt::format("rank {}, tag '{}': {}", rank(), options.tag, error.what());
      ncclCommAbort(std::exchange(nccl_, nullptr));
      if (auto* endable = dynamic_cast<Endable*>(host_.get())) endable->end_group(over_);
      throw CommError(over_);
    }
    ++statistics_.operations;
    statistics_.bytes += bytes;
    statistics_.total += Clock::now() - began;
  }

  template <typename OutOf, typename InOf>
  void exchange(OutOf&& out_of, InOf&& in_of) {
    did(ncclGroupStart(), "an exchange");
    std::span<const std::byte> own_out;
    std::span<std::byte> own_in;
    for (int other = 0; other < size(); ++other) {
      const std::span<const std::byte> out = out_of(other);
      const std::span<std::byte> in = in_of(other);
      if (other == rank()) {
        own_out = out;
        own_in = in;
        continue;
      }
      if (!out.empty())
        did(ncclSend(out.data(), out.size(), ncclUint8, other, nccl_, stream_), "send");
      if (!in.empty())
        did(ncclRecv(in.data(), in.size(), ncclUint8, other, nccl_, stream_), "recv");
    }
    did(ncclGroupEnd(), "an exchange");
    if (!own_in.empty() && own_in.data() != own_out.data())
      copy(own_in.data(), own_out.data(), own_in.size(), cudaMemcpyDeviceToDevice);
  }
  template <typename Body>
  void by_host(std::span<const std::byte> input, std::span<std::byte> output, Body&& body) {
    std::vector<std::byte> in(input.size()), out(output.size());
    copy(in.data(), input.data(), in.size(), cudaMemcpyDeviceToHost);
    body(in, out);
    copy(output.data(), out.data(), out.size(), cudaMemcpyHostToDevice);
  }
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_), "a copy");
    finish();
  }

  // Until NCCL has taken a call up.
  void did(ncclResult_t result, std::string_view what) {
    while (result == ncclInProgress && nccl_ != nullptr) {
      look(what);
      if (ncclCommGetAsyncError(nccl_, &result) != ncclSuccess) break;
    }
    if (result != ncclSuccess && result != ncclInProgress)
      throw CommError(fmt::format("nccl: {}: {}", what, ncclGetErrorString(result)));
  }
  // Until the device is through with it.
  void finish() {
    for (;;) {
      const cudaError_t status = cudaStreamQuery(stream_);
      if (status == cudaSuccess) return;
      if (status != cudaErrorNotReady) check(status, "waiting");
      ncclResult_t result = ncclSuccess;
      ncclCommGetAsyncError(nccl_, &result);
      if (result != ncclSuccess && result != ncclInProgress)
        throw CommError(fmt::format("nccl: {}", ncclGetErrorString(result)));
      look("waiting for the other ranks' devices");
    }
  }
  void look(std::string_view what) const {
    const std::string over = options_.is_over ? options_.is_over() : "";
    if (!over.empty())
      throw CommError(fmt::format("generation {} is over: {}", generation(), over));
    if (deadline_.expired()) throw CommError(fmt::format("nccl: {}: gave up", what));
    std::this_thread::sleep_for(kLook);
  }

  const std::shared_ptr<Group> host_;
  const GroupOptions options_;
  cudaStream_t stream_ = nullptr;
  ncclComm_t nccl_ = nullptr;
  std::vector<void*> memory_;
  std::span<std::byte> host_slots_;
  std::uint64_t next_sequence_ = 0;
  Deadline deadline_ = Deadline::never();
  std::string over_;
  GroupStatistics statistics_;
};

}  // namespace

std::string nccl_unavailable() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  return status == cudaSuccess && devices > 0 ? "" : "this machine has no CUDA device";
}

std::unique_ptr<Group> make_nccl_group(std::shared_ptr<Group> host, const GroupOptions& options) {
  if (const std::string why = nccl_unavailable(); !why.empty())
    throw ConfigError("no group of CUDA devices: " + why, "use a backend of the host");
  return std::make_unique<NcclGroup>(std::move(host), options);
}

}  // namespace lockstep
