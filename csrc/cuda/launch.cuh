// What every kernel needs from its platform: the CUDA toolkit, or the host emulator of the tests.
#pragma once

#if defined(AIA_EMULATOR)
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// A block's array in shared memory, uninitialised, aligned for vectors.
#define AIA_SHARED(type, name, count) __shared__ __align__(16) type name[count]

namespace aia::cuda {

// The value of the lane of a warp whose number differs by these bits. All lanes of the warp come along.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int bits) {
  return __shfl_xor_sync(0xffffffffu, value, bits);
}

// Queues a kernel on a stream; returns the error code of the launch.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
           std::type_identity_t<Parameters>... parameters) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), static_cast<unsigned>(blocks), threads, addresses, 0,
                          static_cast<cudaStream_t>(stream));
}

inline bool captures(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess ||
         status != cudaStreamCaptureStatusNone;
}

inline const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace aia::cuda
#endif
