// Asynchronous copies to shared memory on the CPU (see cuda_runtime.h here): done at the last
// moment, when a thread waits for them.

#ifndef TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_PIPELINE_PRIMITIVES_H_
#define TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_PIPELINE_PRIMITIVES_H_

#include <cstddef>

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes);
void __pipeline_commit();
void __pipeline_wait_prior(size_t groups);

#endif  // TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_PIPELINE_PRIMITIVES_H_
