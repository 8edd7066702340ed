// Models of tests, which change them tensor by tensor.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"

namespace rwkv::checkpoint {

// The base row: 3 layers, D 32, H 2, N 16, F 48, V 11; small, because one test rewrites it for each of its tensors.
testing::RandomModelOptions BaseOptions(ModelVersion version = ModelVersion::k7);
std::vector<testing::RawTensor> BaseModel();

// What a file of these tensors is.
absl::StatusOr<ModelConfig> ConfigOf(const std::vector<testing::RawTensor>& tensors);

// The tensor of that name; the test has failed if there is none.
testing::RawTensor& Named(std::vector<testing::RawTensor>* tensors, const std::string& name);
// The test has failed if none was unwanted.
void Remove(std::vector<testing::RawTensor>* tensors, const std::function<bool(const std::string&)>& is_unwanted);
// Its elements become zeros.
void Reshape(testing::RawTensor* tensor, std::vector<int64_t> shape);
testing::RawTensor Zeros(const std::string& name, std::vector<int64_t> shape,
                         ElementType type = ElementType::kBFloat16);

}  // namespace rwkv::checkpoint
