// The questions and launches of csrc/cuda/launch.cuh, as C functions, on the devices of rehearsal.h.
#define AIA_EMULATOR
#define AIA_REHEARSAL
#include "../../csrc/cuda/launch.cuh"

namespace {

constexpr int kThreads = 256;

void kernel(int) {}

}  // namespace

extern "C" {

void use_device(int device) { stub::device = device; }
void fail(const char* function, int error) { stub::errors[function] = error; }
void be_deaf(bool deaf) { stub::deaf = deaf; }
int questions() { return stub::questions; }

int multiprocessors() { return aia::cuda::multiprocessors(); }
int cache_bytes() { return aia::cuda::cache_bytes(); }
aia::cuda::Answer clusters_together(int cluster, int bytes) {
  return aia::cuda::clusters_together(kernel, cluster, kThreads, bytes);
}
int launch_clusters(int cluster, int bytes) {
  return aia::cuda::launch_clusters(kernel, cluster, cluster, kThreads, bytes, nullptr, 0);
}
}
