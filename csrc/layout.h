// Converts `axis` to the layout of weight_norm.h, for the ops, XLA and the Python bindings.

#ifndef TFWN_CSRC_LAYOUT_H_
#define TFWN_CSRC_LAYOUT_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "weight_norm.h"

namespace tfwn {

using Axis = std::vector<int64_t>;   // the axes of v that index its units; empty for a single norm
using Sizes = std::vector<int64_t>;  // a shape; -1 for an unknown size

inline int64_t Product(const Sizes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

inline std::string Text(const std::vector<int64_t>& list, bool shape = false) {
  std::string text;
  for (const int64_t x : list) {
    text += (text.empty() ? "" : ", ") + (shape && x < 0 ? "?" : std::to_string(x));
  }
  return "[" + text + "]";
}

inline std::string ShapeText(const Sizes& sizes) { return Text(sizes, true); }

inline bool Compatible(const Sizes& a, const Sizes& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](int64_t m, int64_t n) { return m == n || m < 0 || n < 0; });
}

// CheckAxis, CheckConsecutive, CheckG, CheckSameShape and FindLayout return an error message, or an
// empty string if all is well.

// Also converts negative axes to nonnegative ones.
inline std::string CheckAxis(int64_t rank, Axis* axis) {
  const Axis given = *axis;
  for (int64_t& a : *axis) {
    if (rank == 0) return "axis must be None for a scalar v, but is " + Text(given);
    if (a < -rank || a >= rank) {
      return "axis must name axes of v, which has rank " + std::to_string(rank) + ": from " +
             std::to_string(-rank) + " to " + std::to_string(rank - 1) + ", but is " + Text(given);
    }
    if (a < 0) a += rank;
  }
  for (const int64_t a : *axis) {
    if (std::count(axis->begin(), axis->end(), a) > 1) {
      return "axis must name each axis of v once, but is " + Text(given) + " for v of rank " +
             std::to_string(rank);
    }
  }
  return "";
}

// The kernels need consecutive axes in ascending order. `axis` must have passed CheckAxis.
inline std::string CheckConsecutive(int64_t rank, const Axis& axis) {
  for (size_t i = 1; i < axis.size(); ++i) {
    if (axis[i] != axis[i - 1] + 1) {
      return "axis must name consecutive axes in ascending order, but is " + Text(axis) +
             " for v of rank " + std::to_string(rank) + ". Transpose v";
    }
  }
  return "";
}

// expected: the sizes of v along `axis`. v: null if not even its rank is known.
inline std::string CheckG(const Axis& axis, const Sizes& expected, const Sizes* v, const Sizes& g) {
  if (Compatible(g, expected)) return "";
  std::string text = "g must have shape " + ShapeText(expected);
  text +=
      axis.empty() ? ", for one norm over the whole of v" : ", the sizes of v's axes " + Text(axis);
  text += ", but has shape " + ShapeText(g);
  if (v != nullptr) {
    text += "; v has shape " + ShapeText(*v);
    if (Product(g) == Product(expected)) text += "; reshape g";
  }
  return text;
}

inline std::string CheckSameShape(const char* name, const Sizes& sizes, const char* other_name,
                                  const Sizes& other) {
  if (Compatible(sizes, other)) return "";
  return std::string(name) + " must have " + other_name + "'s shape " + ShapeText(other) +
         ", but has shape " + ShapeText(sizes);
}

// `axis` must have passed CheckAxis and CheckConsecutive.
inline Layout Collapse(const Sizes& v, const Axis& axis) {
  const size_t first = axis.empty() ? 0 : axis[0];
  Layout layout = {1, 1, 1};
  for (size_t a = 0; a < v.size(); ++a) {
    (a < first ? layout.outer : a < first + axis.size() ? layout.units : layout.inner) *= v[a];
  }
  return layout;
}

// Checks axis and g, and sets *layout, for a call whose shapes are fully known.
inline std::string FindLayout(Axis axis, const Sizes& v, const Sizes& g, Layout* layout) {
  const Axis given = axis;
  const int64_t rank = v.size();
  std::string error = CheckAxis(rank, &axis);
  if (error.empty()) error = CheckConsecutive(rank, axis);
  if (!error.empty()) return error;
  Sizes units;
  for (const int64_t a : axis) units.push_back(v[a]);
  *layout = Collapse(v, axis);
  return CheckG(given, units, &v, g);
}

}  // namespace tfwn

#endif  // TFWN_CSRC_LAYOUT_H_
