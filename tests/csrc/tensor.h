// Tensors of any type in memory of exactly their size, with a simple implementation of the types.

#ifndef TFWN_TESTS_CSRC_TENSOR_H_
#define TFWN_TESTS_CSRC_TENSOR_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "weight_norm.h"

namespace tfwn {

// The exponent range and the precision fully describe a format, so this needs no bit tricks.
struct Format {
  int bits;   // of precision, including the hidden bit
  int least;  // exponent of the smallest normal number
  double most;
};

inline Format FormatOf(Type type) {
  switch (type) {
    case Type::kHalf:
      return {11, -14, 65504};
    case Type::kBfloat16:
      return {8, -126, std::ldexp(1.0 - std::ldexp(1.0, -8), 128)};
    case Type::kFloat:
      return {24, -126, std::numeric_limits<float>::max()};
    default:
      return {53, -1022, std::numeric_limits<double>::max()};
  }
}

// Returns the nearest number of the type, ties to even.
inline double Round(double value, Type type) {
  if (type == Type::kDouble) return value;
  if (type == Type::kFloat) return static_cast<float>(value);
  if (value == 0 || !std::isfinite(value)) return value;
  const Format format = FormatOf(type);
  const int exponent = std::max(std::ilogb(value), format.least) - (format.bits - 1);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
  return std::fabs(rounded) > format.most ? std::copysign(INFINITY, value) : rounded;
}

inline double Decode(Type type, uint16_t bits) {
  const Format format = FormatOf(type);
  const int stored = format.bits - 1;
  const int mantissa = bits & ((1 << stored) - 1);
  const int exponent = (bits & 0x7fff) >> stored;
  double value;
  if (exponent == (0x7fff >> stored)) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, format.least - stored);
  } else {
    value = std::ldexp(mantissa + (1 << stored), exponent - 1 + format.least - stored);
  }
  return bits & 0x8000 ? -value : value;
}

inline uint16_t Encode(Type type, double value) {
  const Format format = FormatOf(type);
  const int stored = format.bits - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = 0x7fff >> stored << stored;
  if (std::isnan(value)) return sign | infinity | 1 << (stored - 1);
  value = std::fabs(Round(value, type));
  if (std::isinf(value)) return sign | infinity;
  const int exponent = value == 0 ? format.least : std::max(std::ilogb(value), format.least);
  const int mantissa = static_cast<int>(std::ldexp(value, stored - exponent));
  // The hidden bit of a normal number adds 1 to the exponent field, which is 0 for a subnormal.
  return sign | (((exponent - format.least) << stored) + mantissa);
}

// Number of elements by which buffers are offset from the alignment of a new allocation.
inline int misalignment = 0;

// A tensor in memory of exactly its size, between guard bytes unless the address sanitizer runs.
class Buffer {
 public:
  Buffer(Type type, int64_t size)
      : type_(type),
        size_(size),
        shift_(misalignment * SizeOf(type)),
        bytes_(new unsigned char[shift_ + Bytes() + 2 * kGuard]) {
    std::memset(bytes_.get(), 0xa5, shift_ + Bytes() + 2 * kGuard);
  }
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 64;
#endif
  size_t Bytes() const { return size_ * SizeOf(type_); }
  void* data() const { return bytes_.get() + kGuard + shift_; }
  int64_t size() const { return size_; }
  bool Intact() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (bytes_[shift_ + i] != 0xa5 || bytes_[shift_ + kGuard + Bytes() + i] != 0xa5) return false;
    }
    return true;
  }
  double operator[](int64_t i) const {
    switch (type_) {
      case Type::kFloat:
        return static_cast<const float*>(data())[i];
      case Type::kDouble:
        return static_cast<const double*>(data())[i];
      default: {
        uint16_t bits;
        std::memcpy(&bits, static_cast<const char*>(data()) + 2 * i, 2);
        return Decode(type_, bits);
      }
    }
  }
  void Set(int64_t i, double value) {
    switch (type_) {
      case Type::kFloat:
        static_cast<float*>(data())[i] = static_cast<float>(value);
        break;
      case Type::kDouble:
        static_cast<double*>(data())[i] = value;
        break;
      default: {
        const uint16_t bits = Encode(type_, value);
        std::memcpy(static_cast<char*>(data()) + 2 * i, &bits, 2);
      }
    }
  }
  bool operator==(const Buffer& other) const {
    return Bytes() == other.Bytes() && std::memcmp(data(), other.data(), Bytes()) == 0;
  }

 private:
  Type type_;
  int64_t size_;
  size_t shift_;
  std::unique_ptr<unsigned char[]> bytes_;
};

}  // namespace tfwn

#endif  // TFWN_TESTS_CSRC_TENSOR_H_
