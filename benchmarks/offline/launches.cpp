// A CUDA runtime that runs nothing and tells its caller of every launch, and the passes of csrc/cuda behind C
// functions: by these the kernels that a shape takes, their grids and their parameters are had without a GPU
// (launches.py).
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>

#include "../../csrc/cuda/bricks.h"
#include "../../csrc/cuda/passes.h"
#include "../../csrc/cuda/strips.h"

// A library may have some of the passes alone.
namespace aia::cuda {
[[gnu::weak]] int pool(const Shape&, const void*, int, Gate, void*, void*, int, void*);
[[gnu::weak]] int pool_by_strips(const Shape&, const void*, Gate, void*, void*, int, void*);
[[gnu::weak]] int unpool_reduce_by_strips(const Shape&, const void*, Unpooled, void*, void*);
[[gnu::weak]] int unpool_reduce_by_bricks(const Shape&, const void*, Unpooled, void*, void*);
[[gnu::weak]] int recalibrate_reduce_by_strips(const Shape&, const void*, const void*, void*, void*);
[[gnu::weak]] int unpool(const Shape&, const void*, Gate, Unpooled, Gate, Unpooled, void*, void*);
[[gnu::weak]] int unpool_reduce(const Shape&, const void*, Unpooled, int, void*, void*);
[[gnu::weak]] int recalibrate(const Shape&, const void*, Gate, void*, void*);
[[gnu::weak]] int recalibrate_reduce(const Shape&, const void*, const void*, int, void*, void*);
[[gnu::weak]] int gate(const PackedDims&, Scalar, const GateParameters*, const void*, void*, void*, void*, Workspace,
                       void*);
[[gnu::weak]] int gate_again(const PackedDims&, Scalar, const GateParameters*, const void*, const void*, void*, void*,
                             void*);
[[gnu::weak]] int gate_backward(const PackedDims&, Scalar, const GateParameters*, const GateParameters*, Parameter,
                                const GateKept&, const void*, const void*, void*, Workspace, void*);
}  // namespace aia::cuda

namespace {

using Told = void (*)(const char* kernel, unsigned blocks, unsigned threads, unsigned shared_bytes, void** arguments);

Told told;
// Filled while the library is loaded, in whatever order its parts are.
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

void* buffer(int number) { return reinterpret_cast<void*>(static_cast<uintptr_t>(number) << 40); }

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels()[function] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t bytes,
                             cudaStream_t) {
  told(kernels().at(function).c_str(), grid.x, block.x, static_cast<unsigned>(bytes), arguments);
  return cudaSuccess;
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t bytes,
                                        cudaStream_t) {
  return cudaLaunchKernel(function, grid, block, arguments, bytes, nullptr);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, nullptr);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 132
           : attribute == cudaDevAttrL2CacheSize                  ? 50 << 20
           : attribute == cudaDevAttrClusterLaunch                ? 1
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10
                                                                  : 0;
  return cudaSuccess;
}

// Buffers: 1 and 2 are x-sized inputs, 3 an x-sized output; 4 and more are maps.
int launches_of(const char* pass, const int64_t* sizes, int order, int scalar, int context, int gate_context,
                int index_bytes, int inner_bytes, Told tell) {
  using namespace aia;
  using namespace aia::cuda;
  told = tell;
  const std::string name = pass;
  const Shape shape{sizes[0],
                    static_cast<int>(sizes[1]),
                    static_cast<int>(sizes[2]),
                    static_cast<int>(sizes[3]),
                    static_cast<int>(sizes[4]),
                    static_cast<Order>(order),
                    static_cast<Scalar>(scalar)};
  const Gate gate{buffer(4), context}, inner_gate{gate_context ? buffer(5) : nullptr, gate_context};
  const Unpooled outer{buffer(6), buffer(7), index_bytes, context};
  const Unpooled inner{buffer(8), buffer(9), inner_bytes, gate_context};
  if (name == "pool by strips" && cuda::pool_by_strips)
    return cuda::pool_by_strips(shape, buffer(1), inner_gate, buffer(6), buffer(7), index_bytes, nullptr);
  if (name == "unpool_reduce by strips" && cuda::unpool_reduce_by_strips)
    return cuda::unpool_reduce_by_strips(shape, buffer(1), outer, buffer(5), nullptr);
  if (name == "recalibrate_reduce by strips" && cuda::recalibrate_reduce_by_strips)
    return cuda::recalibrate_reduce_by_strips(shape, buffer(1), buffer(2), buffer(4), nullptr);
  if (name == "pool" && cuda::pool)
    return cuda::pool(shape, buffer(1), context, inner_gate, buffer(6), buffer(7), index_bytes, nullptr);
  if (name == "recalibrate" && cuda::recalibrate) return cuda::recalibrate(shape, buffer(1), gate, buffer(3), nullptr);
  if (name == "recalibrate_reduce" && cuda::recalibrate_reduce)
    return cuda::recalibrate_reduce(shape, buffer(1), buffer(2), context, buffer(4), nullptr);
  if (name == "unpool_reduce by bricks" && cuda::unpool_reduce_by_bricks)
    return cuda::unpool_reduce_by_bricks(shape, buffer(1), outer, buffer(5), nullptr);
  if (name == "unpool_reduce" && cuda::unpool_reduce)
    return cuda::unpool_reduce(shape, buffer(1), outer, gate_context, buffer(5), nullptr);
  if (name == "unpool" && cuda::unpool)
    return cuda::unpool(shape, buffer(1), gate, outer, inner_gate, inner, buffer(3), nullptr);
  return -1;
}

// The gate passes on n maps in float, with the statistics of the batch. Buffers: 1 is pooled, 2 grad_gate, 3 what is
// written, a map of each clip or, of gate_backward, two; 4 is z, of gate_again the gate; 5 and more are small.
int launches_of_gate(const char* pass, int64_t batch, int n, const int64_t* dims, Told tell) {
  using namespace aia;
  using namespace aia::cuda;
  told = tell;
  const std::string name = pass;
  PackedDims packed{batch, n, {}};
  GateParameters gates[3]{};
  for (int m = 0; m < n; ++m) {
    for (int k = 0; k < 3; ++k) packed.dims[m][k] = dims[3 * m + k];
    gates[m].weight = {buffer(5), Scalar::kFloat32};
    gates[m].stride[0] = 27, gates[m].stride[1] = 9, gates[m].stride[2] = 3, gates[m].stride[3] = 1;
    gates[m].batch = true;
  }
  const Workspace workspace{static_cast<double*>(buffer(6)), 132};
  const Scalar scalar = Scalar::kFloat32;
  if (name == "gate" && cuda::gate)
    return cuda::gate(packed, scalar, gates, buffer(1), buffer(3), buffer(7), buffer(8), workspace, nullptr);
  if (name == "gate_again" && cuda::gate_again)
    return cuda::gate_again(packed, scalar, gates, buffer(1), buffer(7), buffer(4), buffer(3), nullptr);
  if (name == "gate_backward" && cuda::gate_backward)
    return cuda::gate_backward(packed, scalar, gates, gates, {buffer(9), Scalar::kFloat32},
                               {buffer(1), buffer(4), buffer(7), buffer(8)}, buffer(2), nullptr, buffer(3), workspace,
                               nullptr);
  return -1;
}
}
