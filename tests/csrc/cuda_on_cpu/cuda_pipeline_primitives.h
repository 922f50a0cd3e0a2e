// Emulates asynchronous copies to shared memory (see cuda_runtime.h in this folder). A copy happens
// as late as possible: when its thread waits for it.

#ifndef TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_PIPELINE_PRIMITIVES_H_
#define TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_PIPELINE_PRIMITIVES_H_

#include <cstddef>

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes);
void __pipeline_commit();
void __pipeline_wait_prior(size_t groups);

#endif  // TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_PIPELINE_PRIMITIVES_H_
