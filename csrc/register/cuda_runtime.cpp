// What the CUDA operators find where they run: torch's current stream, which CUDA there is, and how many blocks they
// may have wait for one another. The library can be asked for it before anything is launched.
#include <dlfcn.h>

#include <cstdlib>

#include "cuda.h"

// Of the CUDA runtime, which is linked in; its header would ask for the toolkit's folder. 0 is success.
extern "C" int cudaRuntimeGetVersion(int* version);
extern "C" int cudaDriverGetVersion(int* version);

namespace aia::cuda {

namespace {

constexpr const char* kSymbol = "aoti_torch_get_current_cuda_stream";

struct Found {
  StreamOf stream_of;
  const char* where;
};

// Torch loads its libraries for itself alone (RTLD_LOCAL), so that the linker does not find this symbol for others. The
// library is asked for it, where it is loaded, or the program, into which some builds link torch.
Found find() {
  if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
    void* symbol = dlsym(library, kSymbol);
    dlclose(library);  // torch keeps it loaded
    if (symbol != nullptr) return {reinterpret_cast<StreamOf>(symbol), "libtorch_cuda.so"};
  }
  if (void* symbol = dlsym(RTLD_DEFAULT, kSymbol)) return {reinterpret_cast<StreamOf>(symbol), "the program"};
  return {nullptr, nullptr};
}

const Found& found() {
  static const Found once = find();
  return once;
}

}  // namespace

StreamOf stream_of_device() { return found().stream_of; }

int most_gate_blocks() {
  const char* const text = std::getenv("AIA_KERNELS_GATE_BLOCKS");
  if (text == nullptr || *text == 0) return kGateBlocks;
  char* end = nullptr;
  const long blocks = std::strtol(text, &end, 10);
  return *end != 0 || blocks < kFewestGateBlocks ? 0 : static_cast<int>(std::min<long>(blocks, kGateBlocks));
}

}  // namespace aia::cuda

#define AIA_EXPORT extern "C" __attribute__((visibility("default")))

// Where torch's current stream was found, or null. Torch must have been imported before the first call.
AIA_EXPORT const char* aia_kernels_stream() { return aia::cuda::found().where; }

// See most_gate_blocks.
AIA_EXPORT int aia_kernels_gate_blocks() { return aia::cuda::most_gate_blocks(); }

// The CUDA that the library was built with, and the newest that the driver knows (0 without one), as
// 1000 * major + 10 * minor.
AIA_EXPORT int aia_kernels_cuda_runtime() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == 0 ? version : 0;
}
AIA_EXPORT int aia_kernels_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == 0 ? version : 0;
}
