// A trained model's file beside its module: what is saved besides the module's own tensors (how
// inputs are normalised, the names of a table's columns), and loading it all back.
#pragma once

#include <string>
#include <vector>

#include "lockstep/checkpoint/safetensors.h"
#include "lockstep/train/batches.h"
#include "lockstep/bridge/flat_parameters.h"

namespace lockstep {

// "input.mean" and "input.deviation", float32; "input.columns", uint8: the names of a table's
// columns, a line each.
std::vector<NamedTensor> input_tensors(const Normalization& normalization,
                                       const std::vector<std::string>& columns);

struct SavedInput {
  Normalization normalization;
  std::vector<std::string> columns;  // empty for images
};
SavedInput read_input_tensors(const SafetensorsFile& file, const std::string& path);

// Copies the file's tensors into the module's parameters and buffers. Throws ConfigError naming the
// tensor that is missing or has another shape or dtype.
void load_module(torch::nn::Module& module, const SafetensorsFile& file, const std::string& path);

}  // namespace lockstep
