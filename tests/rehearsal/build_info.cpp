// What setup.py generates for a library with CUDA kernels: those of the devices that the runtime says it has.
#define AIA_EXPORT extern "C" __attribute__((visibility("default")))

AIA_EXPORT const char* aia_kernels_sources() { return nullptr; }
AIA_EXPORT const char* aia_kernels_without_cuda() { return nullptr; }
AIA_EXPORT const char* aia_kernels_cuda_architectures() { return "9.0"; }
