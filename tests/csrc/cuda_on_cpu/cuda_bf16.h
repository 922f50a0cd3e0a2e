// Emulates bfloat16 on the CPU as the upper half of a float (see cuda_runtime.h in this folder).

#ifndef TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_BF16_H_
#define TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_BF16_H_

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // Rounds to nearest, ties to even. A carry out of the fraction correctly raises the exponent.
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Rounds to a float by round-to-odd first, so that rounding twice equals rounding once.
inline __nv_bfloat16 __double2bfloat16(double x) {
  float nearest = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof(bits));
  if (std::isfinite(x) && static_cast<double>(nearest) != x && (bits & 1) == 0) {
    const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(x);
    bits += away ? -1 : 1;
    std::memcpy(&nearest, &bits, sizeof(nearest));
  }
  return __float2bfloat16_rn(nearest);
}

#endif  // TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_BF16_H_
