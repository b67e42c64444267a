// What the runtime says of its devices, and the errors and complaints that it keeps.
#include "device.h"

#include <cstdio>
#include <cstring>
#include <utility>

namespace aia::rehearsal {

std::recursive_mutex mutex;
thread_local int current_device = 0;
cudaError_t sticky_error = cudaSuccess;

namespace {

constexpr size_t kMostComplaints = 10000;

thread_local cudaError_t last_error = cudaSuccess;
std::vector<std::string> complaints;

}  // namespace

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void complain(const std::string& text) {
  if (complaints.size() < kMostComplaints) complaints.push_back(text);
}

cudaError_t refuse(cudaError_t error, const std::string& text) {
  complain(text);
  return result(error);
}

}  // namespace aia::rehearsal

using namespace aia::rehearsal;

extern "C" {

// The complaints since the last call, one a line.
const char* rehearsal_complaints() {
  const Lock lock(mutex);
  check_guards("found at the end");
  check_freed();
  static thread_local std::string text;
  text.clear();
  for (const std::string& complaint : complaints) text += complaint + "\n";
  complaints.clear();
  return text.c_str();
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, "rehearsal: no GPU, the limits of an H100");
  p->uuid.bytes[0] = static_cast<char>(device + 1), p->pciBusID = device + 1;
  p->major = 9, p->minor = 0, p->multiProcessorCount = kMultiprocessors, p->warpSize = 32;
  p->totalGlobalMem = kMemory, p->l2CacheSize = kCache, p->totalConstMem = 64 << 10, p->memPitch = kGridX;
  p->sharedMemPerBlock = kSharedDefault, p->sharedMemPerBlockOptin = kSharedOptin;
  p->sharedMemPerMultiprocessor = kSharedAll, p->reservedSharedMemPerBlock = kSharedReserved;
  p->regsPerBlock = p->regsPerMultiprocessor = kRegisters;
  p->maxThreadsPerBlock = kThreads, p->maxThreadsPerMultiProcessor = 32 * kWarps;
  p->maxBlocksPerMultiProcessor = kBlocks;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = kThreads, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = kGridX, p->maxGridSize[1] = p->maxGridSize[2] = kGridYZ;
  p->textureAlignment = 512, p->texturePitchAlignment = 32, p->memoryBusWidth = 5120, p->asyncEngineCount = 3;
  p->concurrentKernels = p->ECCEnabled = p->unifiedAddressing = p->canMapHostMemory = 1;
  p->streamPrioritiesSupported = p->cooperativeLaunch = p->clusterLaunch = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = kCache; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrClusterLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedDefault; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = kSharedAll; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = kSharedReserved; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = kThreads; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 32 * kWarps; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = kBlocks; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = kRegisters; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxGridDimX: *value = kGridX; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = kGridYZ; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  return std::snprintf(text, length, "0000:%02x:00.0", device + 1), cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(mutex);
  if (const cudaError_t error = refuse_in_capture(nullptr, "a wait for the device")) return error;
  drain_all(current_device);
  return result(sticky_error);
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, sticky_error); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t) { return "an error of the rehearsal"; }

const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  std::snprintf(text, sizeof text, "error %d of the rehearsal", static_cast<int>(error));
  return text;
}

// Torch asks for functions of the driver that it can do without.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = nullptr;
  if (status) *status = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
