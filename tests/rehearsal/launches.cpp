// Kernels, their limits and their launches.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <sstream>

#include "device.h"

namespace aia::rehearsal {

namespace {

// What a compiler would say of a kernel, no compiler having been asked.
constexpr int kKernelRegisters = 64;
constexpr unsigned kMostInCluster = 16, kPortableCluster = 8;

// A kernel. Those of torch have no `bind`: their launches are recorded and not run.
struct Function {
  std::string name;
  Bind bind = nullptr;
  const void* address = nullptr;
  int dynamic_bytes = kSharedDefault;
  bool non_portable = false;
};

// Kernels at their real sizes would take hours: their launches can be checked alone.
const bool recording = std::getenv("AIA_REHEARSAL_RECORD") != nullptr;

std::map<const void*, std::unique_ptr<Function>> functions;
std::vector<std::string> launches;

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                                         std::free);
  return status == 0 ? text.get() : name;
}

Function* find(const void* address) {
  const auto found = functions.find(address);
  return found == functions.end() ? nullptr : found->second.get();
}

void add(const void* address, const std::string& name, Bind bind) {
  functions[address] = std::make_unique<Function>(Function{name, bind, address});
}

int blocks_each(int threads, size_t dynamic_bytes) {
  const int warps = (threads + 31) / 32;
  const int by_registers = kRegisters / (kKernelRegisters * 32 * warps);
  const int by_shared = static_cast<int>(kSharedAll / (dynamic_bytes + kSharedReserved));
  return std::min({kBlocks, kWarps / warps, by_registers, by_shared});
}

int clusters_at_once(int cluster, int threads, size_t dynamic_bytes) {
  int clusters = 0;
  for (const int multiprocessors : kGroups) clusters += multiprocessors * blocks_each(threads, dynamic_bytes) / cluster;
  return clusters;
}

bool is_cluster(const Function& f, unsigned cluster) {
  return cluster <= (f.non_portable ? kMostInCluster : kPortableCluster);
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  return 1;
}

Launch launch_of(dim3 grid, dim3 block, size_t dynamic_bytes) {
  Launch launch;
  launch.grid[0] = grid.x, launch.grid[1] = grid.y, launch.grid[2] = grid.z;
  launch.block[0] = block.x, launch.block[1] = block.y, launch.block[2] = block.z;
  launch.dynamic_bytes = dynamic_bytes;
  return launch;
}

// One line: the fields of a launch as Python reads them, then the name.
std::string text_of(const Function* f, const Launch& launch, const Stream* stream) {
  std::ostringstream text;
  text << (f && f->bind && !recording ? "run" : "recorded") << " grid " << launch.grid[0] << ',' << launch.grid[1]
       << ',' << launch.grid[2] << " block " << launch.block[0] << ',' << launch.block[1] << ',' << launch.block[2]
       << " dynamic " << launch.dynamic_bytes << " cluster " << launch.cluster << " cooperative " << launch.cooperative
       << " device " << current_device << " stream " << (stream ? stream->number : -1) << " kernel "
       << (f ? f->name : "unknown");
  return text.str();
}

struct Refusal {
  cudaError_t error = cudaSuccess;
  std::string why;
};

// What an H100 would say to a launch.
Refusal refusal_of(const Function& f, const Launch& launch) {
  const auto &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  const uint64_t blocks = uint64_t{grid[0]} * grid[1] * grid[2];
  if (blocks == 0 || grid[0] > kGridX || grid[1] > kGridYZ || grid[2] > kGridYZ)
    return {cudaErrorInvalidConfiguration, "no grid of this size"};
  if (threads == 0 || threads > kThreads || block[2] > 64)
    return {cudaErrorInvalidConfiguration, "no block of this size"};
  if (launch.dynamic_bytes > static_cast<size_t>(f.dynamic_bytes))
    return {cudaErrorInvalidValue, "only " + std::to_string(f.dynamic_bytes) + " bytes of shared memory are allowed"};
  const int each = blocks_each(static_cast<int>(threads), launch.dynamic_bytes);
  if (launch.cluster > 1) {
    if (!is_cluster(f, launch.cluster)) return {cudaErrorInvalidClusterSize, "no cluster of this size is allowed"};
    if (grid[0] % launch.cluster != 0) return {cudaErrorInvalidConfiguration, "the grid is not one of whole clusters"};
    if (clusters_at_once(launch.cluster, static_cast<int>(threads), launch.dynamic_bytes) == 0)
      return {cudaErrorInvalidClusterSize, "no cluster fits"};
  }
  const uint64_t together = uint64_t{kMultiprocessors} * each;
  if (launch.cooperative && blocks > together)
    return {cudaErrorCooperativeLaunchTooLarge, "only " + std::to_string(together) + " blocks fit together"};
  return {};
}

cudaError_t queue_launch(const void* address, const Launch& launch, void** arguments, cudaStream_t handle) {
  if (sticky_error != cudaSuccess) return result(sticky_error);
  const Function* const f = find(address);
  Stream* const stream = stream_of(handle);
  const std::string what = text_of(f, launch, stream);
  if (!f) return refuse(cudaErrorInvalidDeviceFunction, "no such kernel: " + what);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "no such stream: " + what);
  if (stream->device != current_device)
    return refuse(cudaErrorInvalidResourceHandle,
                  "the stream is of device " + std::to_string(stream->device) + ": " + what);
  if (const Refusal refusal = refusal_of(*f, launch); refusal.error != cudaSuccess)
    return refuse(refusal.error, refusal.why + ": " + what);
  launches.push_back(what);
  if (!f->bind) return cudaSuccess;
  const std::shared_ptr<Bound> bound(f->bind(f->address, arguments));
  check_pointers(bound->pointers(), what);
  if (recording) return cudaSuccess;
  queue(*stream, [bound, launch, what] {
    try {
      bound->run(launch);
    } catch (const std::exception& error) {
      complain(std::string(error.what()) + ": " + what);
      sticky_error = cudaErrorLaunchFailure;
    }
    check_guards(what);
  });
  return cudaSuccess;
}

// What `<<<...>>>` hands over, between its two calls.
thread_local struct {
  dim3 grid, block;
  size_t dynamic_bytes;
  cudaStream_t stream;
} pushed;

}  // namespace

}  // namespace aia::rehearsal

using namespace aia::rehearsal;

extern "C" {

void rehearsal_register(const void* function, Bind bind) {
  const Lock lock(mutex);
  if (find(function)) return;
  Dl_info info{};
  dladdr(function, &info);
  std::ostringstream name;  // which a table of symbols explains
  name << '@' << std::hex << static_cast<const char*>(function) - static_cast<const char*>(info.dli_fbase);
  add(function, name.str(), bind);
}

// The launches since the last call, one a line.
const char* rehearsal_launches() {
  const Lock lock(mutex);
  static thread_local std::string text;
  text.clear();
  for (const std::string& launch : launches) text += launch + "\n";
  launches.clear();
  return text.c_str();
}

// --- What nvcc's code calls when it is loaded, and for <<<...>>>

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(std::calloc(1, sizeof(void*))); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { std::free(handle); }
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const Lock lock(mutex);
  add(function, demangled(name), nullptr);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic_bytes, struct CUstream_st* stream) {
  pushed = {grid, block, dynamic_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic_bytes, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *dynamic_bytes = pushed.dynamic_bytes;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t dynamic_bytes,
                               cudaStream_t stream) {
  const Lock lock(mutex);
  return queue_launch(kernel, launch_of(grid, block, dynamic_bytes), arguments, stream);
}

// --- Launches

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t dynamic_bytes,
                             cudaStream_t stream) {
  const Lock lock(mutex);
  return queue_launch(function, launch_of(grid, block, dynamic_bytes), arguments, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                        size_t dynamic_bytes, cudaStream_t stream) {
  const Lock lock(mutex);
  Launch launch = launch_of(grid, block, dynamic_bytes);
  launch.cooperative = true;
  return queue_launch(function, launch, arguments, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const Lock lock(mutex);
  Launch launch = launch_of(config->gridDim, config->blockDim, config->dynamicSmemBytes);
  launch.cluster = cluster_of(*config);
  return queue_launch(function, launch, arguments, config->stream);
}

// --- What is asked of a kernel

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const Lock lock(mutex);
  Function* const f = find(function);
  if (!f) return refuse(cudaErrorInvalidDeviceFunction, "an attribute of no such kernel");
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > kSharedOptin)
      return refuse(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory asked for " + f->name);
    f->dynamic_bytes = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    f->non_portable = value != 0;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const Lock lock(mutex);
  const Function* const f = find(function);
  if (!f) return result(cudaErrorInvalidDeviceFunction);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = kThreads, attributes->numRegs = kKernelRegisters;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = f->dynamic_bytes, attributes->nonPortableClusterSizeAllowed = f->non_portable;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t dynamic_bytes, unsigned) {
  const Lock lock(mutex);
  if (!find(function)) return refuse(cudaErrorInvalidDeviceFunction, "occupancy of no such kernel");
  if (threads <= 0) return result(cudaErrorInvalidValue);
  *blocks = threads > kThreads ? 0 : blocks_each(threads, dynamic_bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t dynamic_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, dynamic_bytes, 0);
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function, const cudaLaunchConfig_t* config) {
  const Lock lock(mutex);
  const Function* const f = find(function);
  if (!f) return refuse(cudaErrorInvalidDeviceFunction, "occupancy of no such kernel");
  const unsigned cluster = cluster_of(*config);
  if (!is_cluster(*f, cluster)) return result(cudaErrorInvalidClusterSize);
  if (config->dynamicSmemBytes > static_cast<size_t>(f->dynamic_bytes)) return result(cudaErrorInvalidValue);
  *clusters = clusters_at_once(static_cast<int>(cluster), config->blockDim.x, config->dynamicSmemBytes);
  return cudaSuccess;
}

}  // extern "C"
