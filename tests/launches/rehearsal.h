// A CUDA runtime of two devices for csrc/cuda/launch.cuh, that runs nothing and notes what it is asked. The first
// device has clusters of up to 8 blocks, the second has none.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrClusterLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeNonPortableClusterSizeAllowed, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;
using dim3 = unsigned;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  unsigned gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace stub {

constexpr int kAttributes[2][4] = {{132, 50 << 20, 1, 227 << 10}, {108, 40 << 20, 0, 163 << 10}};

inline int device = 0, questions = 0;
inline std::map<std::string, int> errors;  // of functions that are to fail
inline bool deaf = false;                  // attributes of functions are not set, without a word
inline std::map<std::tuple<int, const void*, int>, int> attributes;  // of functions, by device

inline cudaError_t answer(const char* function) { return static_cast<cudaError_t>(errors[function]); }

inline cudaError_t check(const void* function, const cudaLaunchConfig_t& config) {
  const auto of = [&](cudaFuncAttribute attribute) { return attributes[{device, function, attribute}]; };
  if (config.attrs->val.clusterDim.x > 8) return cudaErrorInvalidClusterSize;
  const bool fits = static_cast<int>(config.dynamicSmemBytes) <= of(cudaFuncAttributeMaxDynamicSharedMemorySize);
  return fits && of(cudaFuncAttributeNonPortableClusterSizeAllowed) ? cudaSuccess : cudaErrorInvalidConfiguration;
}

}  // namespace stub

inline cudaError_t cudaGetDevice(int* device) {
  *device = stub::device;
  return stub::answer("cudaGetDevice");
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ++stub::questions;
  *value = stub::kAttributes[device][attribute];
  return stub::answer("cudaDeviceGetAttribute");
}

inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (!stub::deaf) stub::attributes[{stub::device, function, attribute}] = value;
  return stub::answer("cudaFuncSetAttribute");
}

inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* function, const cudaLaunchConfig_t* config) {
  ++stub::questions;
  *count = stub::kAttributes[stub::device][cudaDevAttrMultiProcessorCount] / static_cast<int>(config->gridDim);
  return stub::check(function, *config);
}

inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return stub::check(function, *config);
}

inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaSuccess;
}

namespace aia::cuda {

template <class... Parameters>
const void* function_of(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace aia::cuda
