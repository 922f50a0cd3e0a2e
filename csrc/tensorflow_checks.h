// Converts the error messages of layout.h to absl::Status, and checks the type of norm.

#ifndef TFWN_CSRC_TENSORFLOW_CHECKS_H_
#define TFWN_CSRC_TENSORFLOW_CHECKS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "csrc/layout.h"
#include "csrc/weight_norm.h"
#include "tensorflow/core/framework/types.h"

namespace tfwn {

inline absl::Status StatusOf(const std::string& error) {
  if (error.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("weight_norm: ", error));
}

inline absl::Status CheckNormType(tensorflow::DataType v, tensorflow::DataType norm) {
  const tensorflow::DataType expected =
      v == tensorflow::DT_DOUBLE ? tensorflow::DT_DOUBLE : tensorflow::DT_FLOAT;
  if (norm == expected) return absl::OkStatus();
  return StatusOf(absl::StrCat("norm must be ", DataTypeString(expected), " for v of type ",
                               DataTypeString(v), ", but is ", DataTypeString(norm)));
}

inline Type TypeOf(tensorflow::DataType type) {
  switch (type) {
    case tensorflow::DT_HALF:
      return Type::kHalf;
    case tensorflow::DT_BFLOAT16:
      return Type::kBfloat16;
    case tensorflow::DT_DOUBLE:
      return Type::kDouble;
    default:
      return Type::kFloat;
  }
}

}  // namespace tfwn

#endif  // TFWN_CSRC_TENSORFLOW_CHECKS_H_
