// Emulates half precision with the compiler's own type (see cuda_runtime.h in this folder).

#ifndef TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_FP16_H_
#define TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_FP16_H_

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half __double2half(double x) { return {static_cast<_Float16>(x)}; }

#endif  // TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_FP16_H_
