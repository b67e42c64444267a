// Device memory: host memory between guards.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "device.h"

namespace aia::rehearsal {

namespace {

constexpr size_t kAlign = 512, kGuard = 512;  // bytes before and behind an allocation
constexpr unsigned char kFresh = 0xff, kGuardByte = 0xdb;
constexpr size_t kKept = size_t{32} << 20;  // bytes of freed memory
constexpr int kPinned = -1;

struct Allocation {
  unsigned char* whole;
  size_t bytes, whole_bytes;
  int device;  // or kPinned
};
using Allocations = std::map<uintptr_t, Allocation>;

Allocations allocated, freed;
std::deque<uintptr_t> freed_order;
size_t used = 0, kept = 0;

const Allocations::value_type* find(const Allocations& in, const void* pointer) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  auto next = in.upper_bound(at);
  if (next == in.begin()) return nullptr;
  --next;
  return at < next->first + std::max<size_t>(next->second.bytes, 1) ? &*next : nullptr;
}

void check_guard(uintptr_t start, const Allocation& a, const std::string& after) {
  const auto* const begin = reinterpret_cast<unsigned char*>(start);
  const unsigned char *const end = begin + a.bytes, *const limit = a.whole + a.whole_bytes;
  const auto written = [](unsigned char byte) { return byte != kGuardByte; };
  const auto* found = std::find_if(static_cast<const unsigned char*>(a.whole), begin, written);
  if (found == begin) found = std::find_if(end, limit, written);
  if (found != limit)
    complain("a byte at offset " + std::to_string(found - begin) + " of " + std::to_string(a.bytes) +
             " allocated ones was written: " + after);
}

void check_freed(const Allocations::value_type& of) {
  const auto* const begin = reinterpret_cast<unsigned char*>(of.first);
  const size_t bytes = of.second.bytes;
  if (bytes > 0 && (*begin != kFresh || std::memcmp(begin, begin + 1, bytes - 1) != 0))
    complain("freed memory of " + std::to_string(bytes) + " bytes was written");
}

cudaError_t allocate(void** pointer, size_t bytes, int device) {
  if (device != kPinned && used + bytes > kMemory) return result(cudaErrorMemoryAllocation);
  const size_t whole = (kGuard + bytes + kGuard + kAlign - 1) / kAlign * kAlign;
  auto* const block = static_cast<unsigned char*>(std::aligned_alloc(kAlign, whole));
  if (!block) return result(cudaErrorMemoryAllocation);
  std::memset(block, kGuardByte, whole);
  std::memset(block + kGuard, kFresh, bytes);
  allocated[reinterpret_cast<uintptr_t>(block + kGuard)] = {block, bytes, whole, device};
  if (device != kPinned) used += bytes;
  *pointer = block + kGuard;
  return cudaSuccess;
}

void forget_oldest() {
  const auto oldest = freed.find(freed_order.front());
  freed_order.pop_front();
  check_freed(*oldest);
  kept -= oldest->second.whole_bytes;
  std::free(oldest->second.whole);
  freed.erase(oldest);
}

bool pageable(const void* pointer) { return find(allocated, pointer) == nullptr; }

void check_range(const void* pointer, size_t bytes, const std::string& what) {
  if (const auto* const found = find(allocated, pointer)) {
    if (reinterpret_cast<uintptr_t>(pointer) + bytes > found->first + found->second.bytes)
      complain(what + " past the end of an allocation");
  } else if (find(freed, pointer)) {
    complain(what + " of freed memory");
  }
}

// A copy in the order of a stream; pageable memory is read before, and has been written when it returns, as in CUDA.
cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t handle) {
  Stream* const stream = stream_of(handle);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "a copy on no such stream");
  check_range(to, bytes, "a copy to memory");
  check_range(from, bytes, "a copy from memory");
  if (pageable(from)) {
    const auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
    queue(*stream, [=] { std::memcpy(to, staged->data(), bytes); });
  } else {
    queue(*stream, [=] { std::memmove(to, from, bytes); });
  }
  if (pageable(to)) drain(*stream);
  return cudaSuccess;
}

cudaError_t set(void* to, int value, size_t bytes, cudaStream_t handle) {
  Stream* const stream = stream_of(handle);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "a memset on no such stream");
  check_range(to, bytes, "a memset of memory");
  queue(*stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

}  // namespace

size_t used_bytes() { return used; }

void check_guards(const std::string& after) {
  for (const auto& [start, a] : allocated) check_guard(start, a, after);
}

void check_freed() {
  for (const auto& of : freed) check_freed(of);
}

void check_pointers(const std::vector<const void*>& pointers, const std::string& what) {
  for (size_t i = 0; i < pointers.size(); ++i) {
    const std::string which = "pointer " + std::to_string(i) + " leads ";
    if (const auto* const found = find(allocated, pointers[i])) {
      const int device = found->second.device;
      if (device != kPinned && device != current_device)
        complain(which + "to device " + std::to_string(device) + ": " + what);
    } else if (find(freed, pointers[i])) {
      complain(which + "to freed memory: " + what);
    } else if (pointers[i] != nullptr) {
      complain(which + "to memory that the runtime did not give: " + what);
    }
  }
}

}  // namespace aia::rehearsal

using namespace aia::rehearsal;

extern "C" {

// Device memory that is allocated, of all devices.
size_t rehearsal_used_bytes() {
  const Lock lock(mutex);
  return used_bytes();
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const Lock lock(mutex);
  return allocate(pointer, bytes, current_device);
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  const Lock lock(mutex);
  return allocate(pointer, bytes, kPinned);
}

cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  const Lock lock(mutex);
  const auto found = allocated.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == allocated.end()) return refuse(cudaErrorInvalidValue, "a free of what was not allocated");
  for (int device = 0; device < kDevices; ++device) drain_all(device);
  check_guard(found->first, found->second, "found when it was freed");
  if (found->second.device != kPinned) used -= found->second.bytes;
  std::memset(pointer, kFresh, found->second.bytes);
  kept += found->second.whole_bytes;
  freed_order.push_back(found->first);
  freed.insert(*found);
  allocated.erase(found);
  while (kept > kKept) forget_oldest();
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  const Lock lock(mutex);
  return *available = kMemory - used, *total = kMemory, cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(mutex);
  std::memset(attributes, 0, sizeof *attributes);
  const auto* const found = find(allocated, pointer);
  const bool pinned = found && found->second.device == kPinned;
  attributes->type = !found ? cudaMemoryTypeUnregistered : pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->device = found ? std::max(found->second.device, 0) : cudaInvalidDeviceId;
  if (found) attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const Lock lock(mutex);
  return copy(to, from, bytes, stream);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  const Lock lock(mutex);
  return copy(to, from, bytes, stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const Lock lock(mutex);
  const cudaError_t error = copy(to, from, bytes, nullptr);
  drain(*stream_of(nullptr));
  return error;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  const Lock lock(mutex);
  for (size_t row = 0; row < height; ++row)
    if (const cudaError_t error = copy(static_cast<char*>(to) + row * to_pitch,
                                       static_cast<const char*>(from) + row * from_pitch, width, stream))
      return error;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(mutex);
  return set(to, value, bytes, stream);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const Lock lock(mutex);
  return set(to, value, bytes, nullptr);
}

}  // extern "C"
