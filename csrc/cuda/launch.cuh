// What every kernel needs from its platform, which is the CUDA toolkit or the host emulator of the tests. The emulator
// brings launches too; with AIA_REHEARSAL it takes those below, on a stand-in for the CUDA runtime.
#pragma once

namespace aia::cuda {

// The threads of a block, and its bytes of AIA_DYNAMIC_SHARED.
struct BlockSize {
  int threads, shared_bytes;

  BlockSize(int threads, int shared_bytes = 0) : threads(threads), shared_bytes(shared_bytes) {}
};

}  // namespace aia::cuda

#if defined(AIA_REHEARSAL)
#include "rehearsal.h"
#elif defined(AIA_EMULATOR)
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

// A block's array in shared memory, uninitialized, aligned for vectors.
#define AIA_SHARED(type, name, count) __shared__ __align__(16) type name[count]
// The same, of as many bytes as the launch says.
#define AIA_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char aia_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(aia_dynamic_shared)

namespace aia::cuda {

// The value of the lane of a warp whose number differs by these bits. All lanes of the warp come along.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int bits) {
  return __shfl_xor_sync(0xffffffffu, value, bits);
}

// The same number, or address in global memory, of which the compiler does not know where it comes from.
__device__ __forceinline__ void opaque(int& number) { asm("" : "+r"(number)); }
template <class T>
__device__ __forceinline__ void opaque(T*& address) {
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
}

// No load is issued before what stands above this. The compiler asks for all that it can at once, and then has too few
// registers; this costs an instruction. All lanes of the warp come along.
__device__ __forceinline__ void issue_in_order() { __syncwarp(); }

// A word whose bytes are all this one of `word`, from the lowest.
__device__ __forceinline__ uint32_t byte_everywhere(uint32_t word, int byte) {
  return __byte_perm(word, 0, 0x1111 * byte);
}

// The same number, of which there are no two ways to write it: no zero with a sign, and one NaN.
__device__ __forceinline__ float settled(float value) { return value + 0.0f; }
// The larger one of settled numbers; NaN if one is.
__device__ __forceinline__ float larger_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}
__device__ __forceinline__ bool same_bits(float a, float b) { return __float_as_int(a) == __float_as_int(b); }
// Puts the lowest byte of another word into a word, at one of its four places, if one number is greater than another.
// One instruction under a predicate, where the compiler would make a new word and choose between the two.
__device__ __forceinline__ void replace_byte_if_greater(float a, float b, uint32_t& word, int place, uint32_t byte) {
  const uint32_t selector = (0x3210 & ~(0xf << 4 * place)) | 4 << 4 * place;
  asm("{ .reg .pred p; setp.gt.f32 p, %1, %2; @p prmt.b32 %0, %0, %3, %4; }"
      : "+r"(word)
      : "f"(a), "f"(b), "r"(byte), "r"(selector));
}

// 2 to the power of a number, and 1 over a number of at least 1, by one instruction each: right to about two units in
// the last place; what is below the least normal number is 0.
__device__ __forceinline__ float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}
__device__ __forceinline__ float one_over(float value) {
  float quotient;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(value));
  return quotient;
}

// Copies so many bytes, 4, 8 or 16, from global to shared memory while the thread goes on. It sees them once it has
// waited for all but the last kLater of its groups; end_of_copies() ends a group, which may be empty.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(kBytes) : "memory");
}
// A place in shared memory as copies take it.
using SharedPlace = unsigned;
__device__ __forceinline__ SharedPlace shared_place(const void* address) {
  return static_cast<SharedPlace>(__cvta_generic_to_shared(address));
}
// Copies so many bytes, 4, 8 or 16, or zeros where nothing is wanted, to kOffset bytes behind a place.
template <int kBytes, int kOffset>
__device__ __forceinline__ void copy_async_or_zero(SharedPlace to, const void* from, bool wanted) {
  const int bytes = wanted ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1], 16, %3;" ::"r"(to), "l"(from), "n"(kOffset), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0 + %3], [%1], %2, %4;" ::"r"(to), "l"(from), "n"(kBytes), "n"(kOffset),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLater>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// Waits for all threads of the warp; what they wrote to shared memory before is then visible to them.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Waits for all blocks of a launch_together; what they wrote to global memory before is then visible to all.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// The place of this block in its cluster. Below compute capability 9.0 there are no clusters: these functions then see
// one of a single block, so that kernels compile, but nothing launches them.
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// Waits for all threads of the cluster; what they wrote before is then visible to all. Needed before the first access
// to the shared memory of another block, which may not have begun, and after the last, so that none ends too early.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same address in the shared memory of a block of this cluster.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(theirs);
#else
  return mine;
#endif
}

// A kernel as the runtime is told of it.
template <class... Parameters>
const void* function_of(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace aia::cuda
#endif

#if !defined(AIA_EMULATOR) || defined(AIA_REHEARSAL)
namespace aia::cuda {

// What a device says when it is asked, or the error with which it does not.
struct Answer {
  int error, value;
};

// Calls `ask(device)` once for a key and the current device, and again after an error. Synchronizes nothing, so a
// stream may be under capture.
template <class Key, class Ask>
Answer answer_of_device(const Key& key, Ask&& ask) {
  int device = 0;
  if (const int error = cudaGetDevice(&device)) return {error, 0};
  static std::mutex mutex;
  static std::map<std::tuple<int, Key>, int> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = answers.find({device, key});
  if (found != answers.end()) return {cudaSuccess, found->second};
  const Answer answer = ask(device);
  cudaGetLastError();  // it was told here, and is not left to the next launch
  if (answer.error == cudaSuccess) answers[{device, key}] = answer.value;
  return answer;
}

// Lets a kernel have so many bytes of AIA_DYNAMIC_SHARED, which above 48 KiB is had by asking; an error code.
inline int allow_shared(const void* function, int bytes) {
  if (bytes == 0) return cudaSuccess;
  const auto ask = [&](int) {
    return Answer{cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), 0};
  };
  return answer_of_device(std::make_tuple(function, bytes), ask).error;
}

// Queues a kernel by queue(function, grid, addresses), which is told what the runtime wants to know of it.
template <class Queue, class... Parameters>
int queue_kernel(const Queue& queue, void (*kernel)(Parameters...), int64_t blocks, const Parameters&... parameters) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  return queue(function_of(kernel), static_cast<unsigned>(blocks), addresses);
}

// How the runtime launches blocks on a stream, all of one size.
using LaunchBlocks = cudaError_t (*)(const void* function, dim3 grid, dim3 block, void** addresses, size_t shared_bytes,
                                     cudaStream_t stream);

template <class... Parameters>
int queue_blocks(LaunchBlocks how, void (*kernel)(Parameters...), int64_t blocks, BlockSize size, void* stream,
                 const Parameters&... parameters) {
  const auto queue = [&](const void* function, unsigned grid, void** addresses) -> int {
    if (const int error = allow_shared(function, size.shared_bytes)) return error;
    return how(function, grid, size.threads, addresses, size.shared_bytes, static_cast<cudaStream_t>(stream));
  };
  return queue_kernel(queue, kernel, blocks, parameters...);
}

// Queues a kernel on a stream; returns the error code of the launch.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, BlockSize size, void* stream,
           std::type_identity_t<Parameters>... parameters) {
  return queue_blocks(cudaLaunchKernel, kernel, blocks, size, stream, parameters...);
}

// An attribute of the current device.
inline Answer attribute_of_device(cudaDeviceAttr attribute) {
  return answer_of_device(attribute, [&](int device) {
    int value = 0;
    const int error = cudaDeviceGetAttribute(&value, attribute, device);
    return Answer{error, value};
  });
}

// The multiprocessors of the current device, and the size of its last cache; 0 where it does not say, after which a
// launch there has an error of its own.
inline int multiprocessors() { return attribute_of_device(cudaDevAttrMultiProcessorCount).value; }
inline int cache_bytes() { return attribute_of_device(cudaDevAttrL2CacheSize).value; }

// Queues a kernel whose blocks all run at once and may wait for one another; an error where they do not fit.
template <class... Parameters>
int launch_together(void (*kernel)(Parameters...), int64_t blocks, BlockSize size, void* stream,
                    std::type_identity_t<Parameters>... parameters) {
  return queue_blocks(cudaLaunchCooperativeKernel, kernel, blocks, size, stream, parameters...);
}

// A launch in clusters as the runtime takes it; refers to itself.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int64_t blocks, int cluster, int threads, int shared_bytes, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;

  // Clusters above 8 blocks and more shared memory than every GPU has are had by asking.
  static int allow(const void* function, int shared_bytes) {
    const int error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
};

// How many clusters of so many blocks, each with so many bytes of AIA_DYNAMIC_SHARED, the current device holds at once;
// 0 where it has no clusters or these do not fit. Any other reason is an error.
template <class... Parameters>
Answer clusters_together(void (*kernel)(Parameters...), int cluster, int threads, int shared_bytes) {
  const Answer has_clusters = attribute_of_device(cudaDevAttrClusterLaunch);
  if (has_clusters.error || !has_clusters.value) return has_clusters;
  const Answer most_bytes = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (most_bytes.error || shared_bytes > most_bytes.value) return {most_bytes.error, 0};
  const void* const function = function_of(kernel);
  return answer_of_device(std::make_tuple(function, cluster, threads, shared_bytes), [&](int) {
    if (const int error = ClusterLaunch::allow(function, shared_bytes)) return Answer{error, 0};
    const ClusterLaunch launch(cluster, cluster, threads, shared_bytes, nullptr);
    int count = 0;
    const int error = cudaOccupancyMaxActiveClusters(&count, function, &launch.config);
    // Not every device with clusters has them of 16 blocks.
    return error == cudaErrorInvalidClusterSize ? Answer{cudaSuccess, 0} : Answer{error, count};
  });
}

// Queues a kernel in clusters of so many blocks; their number is a multiple of that.
template <class... Parameters>
int launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads, int shared_bytes,
                    void* stream, std::type_identity_t<Parameters>... parameters) {
  const auto queue = [&](const void* function, unsigned grid, void** addresses) -> int {
    if (const int error = ClusterLaunch::allow(function, shared_bytes)) return error;
    const ClusterLaunch launch(grid, cluster, threads, shared_bytes, stream);
    return cudaLaunchKernelExC(&launch.config, function, addresses);
  };
  return queue_kernel(queue, kernel, blocks, parameters...);
}

inline const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace aia::cuda
#endif
