// What the ops demand of their inputs, for the shape functions, the kernels and XLA alike.

#ifndef TFWN_CSRC_TENSORFLOW_CHECKS_H_
#define TFWN_CSRC_TENSORFLOW_CHECKS_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/errors.h"

namespace tfwn {

using Axis = std::vector<int32_t>;
using Dims = absl::InlinedVector<int64_t, 8>;  // -1: unknown
using Shape = std::optional<Dims>;             // none: of unknown rank

template <typename... Pieces>
absl::Status InvalidArgument(const Pieces&... pieces) {
  return absl::InvalidArgumentError(absl::StrCat("weight_norm: ", pieces...));
}

inline std::string String(const Dims& dims) {
  return absl::StrCat("[",
                      absl::StrJoin(dims, ", ",
                                    [](std::string* out, int64_t dim) {
                                      absl::StrAppend(out, dim < 0 ? "?" : absl::StrCat(dim));
                                    }),
                      "]");
}

inline std::string String(const Axis& axis) {
  return absl::StrCat("[", absl::StrJoin(axis, ", "), "]");
}

inline bool Compatible(const Dims& a, const Dims& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](int64_t m, int64_t n) { return m == n || m < 0 || n < 0; });
}

// Sets `first` such that `axis` names the axes [first, first + axis.size()) of v.
inline absl::Status CheckAxis(const Axis& axis, int rank, int* first) {
  *first = 0;
  Axis kept;
  for (int32_t a : axis) {
    if (rank == 0) {
      return InvalidArgument("axis must be None for a scalar v, but is ", String(axis));
    }
    if (a < -rank || a >= rank) {
      return InvalidArgument("axis must name axes of v, which has rank ", rank, ": from ", -rank,
                             " to ", rank - 1, ", but is ", String(axis));
    }
    kept.push_back(a < 0 ? a + rank : a);
  }
  if (kept.empty()) return absl::OkStatus();
  *first = kept.front();
  for (size_t i = 0; i < kept.size(); ++i) {
    if (std::count(kept.begin(), kept.end(), kept[i]) > 1) {
      return InvalidArgument("axis must name each axis of v once, but is ", String(axis),
                             " for v of rank ", rank);
    }
  }
  for (size_t i = 0; i < kept.size(); ++i) {
    if (kept[i] != *first + static_cast<int>(i)) {
      return InvalidArgument("the op needs consecutive axes in ascending order, but axis is ",
                             String(axis), " for v of rank ", rank,
                             "; tfwn.weight_norm takes any, by way of a transpose");
    }
  }
  return absl::OkStatus();
}

inline absl::Status CheckG(const Axis& axis, const Shape& v, const Shape& g, int* first) {
  *first = 0;
  if (v.has_value()) TF_RETURN_IF_ERROR(CheckAxis(axis, v->size(), first));
  if (!g.has_value()) return absl::OkStatus();
  const Dims expected = v.has_value() ? Dims(v->begin() + *first, v->begin() + *first + axis.size())
                                      : Dims(axis.size(), -1);
  if (Compatible(*g, expected)) return absl::OkStatus();
  const auto size = [](const Dims& dims) {
    return std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<int64_t>());
  };
  return InvalidArgument("g must have shape ", String(expected),
                         axis.empty() ? ", for one norm over the whole of v"
                                      : absl::StrCat(", the sizes of v's axes ", String(axis)),
                         ", but has shape ", String(*g),
                         v.has_value() ? absl::StrCat("; v has shape ", String(*v)) : "",
                         v.has_value() && size(*g) == size(expected) ? "; reshape g" : "");
}

inline absl::Status CheckSameShape(const char* name, const Shape& shape, const char* as_name,
                                   const Shape& as) {
  if (!shape.has_value() || !as.has_value() || Compatible(*shape, *as)) return absl::OkStatus();
  return InvalidArgument(name, " must have ", as_name, "'s shape ", String(*as), ", but has shape ",
                         String(*shape));
}

inline absl::Status CheckNormType(tensorflow::DataType v, tensorflow::DataType norm) {
  const tensorflow::DataType expected =
      v == tensorflow::DT_DOUBLE ? tensorflow::DT_DOUBLE : tensorflow::DT_FLOAT;
  if (norm == expected) return absl::OkStatus();
  return InvalidArgument("norm must be ", DataTypeString(expected), " for v of type ",
                         DataTypeString(v), ", but is ", DataTypeString(norm));
}

inline Shape ShapeOf(const tensorflow::TensorShape& shape) {
  const auto sizes = shape.dim_sizes();
  return Dims(sizes.begin(), sizes.end());
}

}  // namespace tfwn

#endif  // TFWN_CSRC_TENSORFLOW_CHECKS_H_
