// The devices that are not there: an H100's limits, memory, streams and kernels, which the files of the runtime share.
//
// Work waits in its stream, with copies of its arguments, until the host or an event waits for it; so a kernel on the
// wrong stream, or a result read too early, shows as wrong numbers. Fresh memory is NaN, freed memory is kept for a
// while, and the bytes around an allocation are looked at after every kernel. What an H100 would refuse is refused with
// its error code, and kept as a complaint.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "kernel.h"

namespace aia::rehearsal {

// An H100 SXM. Clusters lie in the multiprocessors of one group. The host has less memory than an H100.
constexpr int kDevices = 2;
constexpr int kMultiprocessors = 132, kGroups[] = {16, 16, 16, 16, 16, 16, 18, 18};
constexpr int kSharedDefault = 48 << 10, kSharedOptin = 227 << 10, kSharedAll = 228 << 10, kSharedReserved = 1 << 10;
constexpr int kRegisters = 65536, kThreads = 1024, kWarps = 64, kBlocks = 32, kCache = 50 << 20;
constexpr unsigned kGridX = 0x7fffffff, kGridYZ = 65535;
constexpr size_t kMemory = size_t{16} << 30;

// Work that was captured, in the order in which it was queued.
struct Graph {
  uint64_t number;
  std::vector<std::function<void()>> nodes;
};

struct Stream {
  int number, device;  // 0 is the default stream of its device
  unsigned flags;
  int priority;
  std::deque<std::function<void()>> waiting;
  bool alive = true;
  uint64_t queued = 0, done = 0;
  Graph* capture = nullptr;
};

// Guards all that follows. Recursive: a host function in a stream may call the runtime.
extern std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

extern thread_local int current_device;
// What a kernel that failed leaves behind: every later call gives it.
extern cudaError_t sticky_error;

cudaError_t result(cudaError_t error);
void complain(const std::string& text);
cudaError_t refuse(cudaError_t error, const std::string& text);

// Memory: complaints about what was written around allocations, about what was written after a free, and about pointers
// that lead nowhere or to another device.
void check_guards(const std::string& after);
void check_freed();
void check_pointers(const std::vector<const void*>& pointers, const std::string& what);
size_t used_bytes();

// Streams. nullptr where there is no such stream; `queue` appends work, and `drain` runs what waits.
Stream* stream_of(cudaStream_t handle);
void queue(Stream& stream, std::function<void()> work);
void drain(Stream& stream);
void drain_all(int device);
// An error where the host may not wait, because of a capture of this stream, or of any.
cudaError_t refuse_in_capture(const Stream* stream, const char* what);

}  // namespace aia::rehearsal
