#include "lockstep/recipes/saved_model.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/nn/module.h>

#include <cstring>
#include <sstream>

#include "lockstep/base/error.h"
#include "lockstep/bridge/dtypes.h"

namespace lockstep {
namespace {

constexpr const char* kMean = "input.mean";
constexpr const char* kDeviation = "input.deviation";
constexpr const char* kColumns = "input.columns";

at::Tensor to_tensor(std::span<const std::byte> bytes, at::ScalarType type) {
  at::Tensor tensor =
      at::empty({static_cast<std::int64_t>(bytes.size() / c10::elementSize(type))}, type);
  if (!bytes.empty()) std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

std::vector<float> floats(const SafetensorsFile& file, const char* name, const std::string& path) {
  const TensorView* view = file.find(name);
  if (view == nullptr || view->dtype != Dtype::float32 || view->bytes.empty())
    throw ConfigError(fmt::format("{}: no float32 tensor {}", path, name),
                      "a model.safetensors that lockstep train wrote");
  std::vector<float> values(view->bytes.size() / sizeof(float));
  std::memcpy(values.data(), view->bytes.data(), view->bytes.size());
  return values;
}

void load_tensor(const std::string& name, const at::Tensor& tensor, const SafetensorsFile& file,
                 const std::string& path) {
  const TensorView* view = file.find(name);
  if (view == nullptr)
    throw ConfigError(fmt::format("{}: tensor {} is missing", path, name),
                      "the model in job.toml beside it must be the one that was trained");
  const std::vector<std::int64_t> expected = tensor.sizes().vec();
  if (view->dtype != dtype_from(tensor.scalar_type()).value() || view->shape != expected)
    throw ConfigError(
        fmt::format("{}: tensor {} is {} [{}], the model takes {} [{}]", path, name,
                    name_of(view->dtype), fmt::join(view->shape, ", "),
                    name_of(dtype_from(tensor.scalar_type()).value()), fmt::join(expected, ", ")),
        "the model in job.toml beside it must be the one that was trained");
  std::memcpy(tensor.mutable_data_ptr(), view->bytes.data(), view->bytes.size());
}

}  // namespace

std::vector<NamedTensor> input_tensors(const Normalization& normalization,
                                       const std::vector<std::string>& columns) {
  const auto floats = [](const std::vector<float>& values) {
    return to_tensor(std::as_bytes(std::span(values)), at::kFloat);
  };
  std::vector<NamedTensor> tensors = {{kMean, floats(normalization.mean)},
                                      {kDeviation, floats(normalization.deviation)}};
  if (!columns.empty()) {
    const std::string lines = fmt::format("{}", fmt::join(columns, "\n"));
    tensors.push_back({kColumns, to_tensor(std::as_bytes(std::span(lines)), at::kByte)});
  }
  return tensors;
}

SavedInput read_input_tensors(const SafetensorsFile& file, const std::string& path) {
  SavedInput input{{floats(file, kMean, path), floats(file, kDeviation, path)}, {}};
  if (const TensorView* view = file.find(kColumns)) {
    std::istringstream lines(
        std::string(reinterpret_cast<const char*>(view->bytes.data()), view->bytes.size()));
    for (std::string line; std::getline(lines, line);) input.columns.push_back(line);
  }
  return input;
}

void load_module(torch::nn::Module& module, const SafetensorsFile& file, const std::string& path) {
  for (const auto& item : module.named_parameters())
    load_tensor(item.key(), item.value(), file, path);
  for (const auto& item : module.named_buffers()) load_tensor(item.key(), item.value(), file, path);
}

}  // namespace lockstep
