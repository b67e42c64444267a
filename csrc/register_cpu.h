// What the files that register CPU operators share: the choice of the instruction level, the split over threads, and
// allocations.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/passes.h"
#include "register_common.h"

namespace aia::cpu {

// Calls pick with the best instruction level that the processor has (0: base, 1: v3, 2: v4), or with a lesser one that
// AIA_KERNELS_CPU_LEVEL names (for tests).
template <class Pick>
auto pick_level(Pick&& pick) {
  int best = 0;
#ifdef AIA_CPU_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) best = 1;
  if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    best = 2;
#endif
  const char* named = std::getenv("AIA_KERNELS_CPU_LEVEL");
  const std::string_view level = named ? named : "";
  return pick(std::min(best, level == "base" ? 0 : level == "v3" ? 1 : 2));
}

template <class Body>
void parallel(int64_t units, const Body& body) {
  torch::stable::parallel_for(0, units, 1, body);
}

// x [B, T, C, H, W] as the passes see it; refused if it is empty or not stored densely.
inline Volume volume_of(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 5, "x must be [B, T, C, H, W], got ", x.dim(), " axes");
  STD_TORCH_CHECK(x.numel() > 0, "x must not be empty");
  Volume v{x.size(0),   x.size(1),   x.size(2),   x.size(3),   x.size(4),
           x.stride(0), x.stride(1), x.stride(2), x.stride(4), scalar_of(x)};
  // Strides of axes of length one are arbitrary: give them the value that the dense orders would.
  if (v.W == 1) v.stride_p = v.H == 1 ? 1 : x.stride(3);
  const bool lines = v.H == 1 || v.W == 1 || x.stride(3) == v.W * v.stride_p;
  if (v.C == 1) v.stride_c = v.stride_p == 1 ? v.H * v.W : 1;
  if (v.H * v.W == 1 && v.stride_c == 1) v.stride_p = v.C;
  STD_TORCH_CHECK(lines && (v.stride_c == 1 || v.stride_p == 1), "x must be stored densely in an order of maps.ORDERS");
  // Where channels lie side by side several blocks of them make longer pieces, if every thread still has a few units.
  if (channels_side_by_side(v)) {
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    v.blocks = std::clamp<int64_t>(v.B * channel_blocks(v) / (4 * threads), 1, 4);
  }
  return v;
}

// Large blocks go back to the system when they are freed, so each new one is paid for page by page, several times what
// writing it costs. Large pages take most of that away. The advice may be refused, which changes nothing.
inline torch::stable::Tensor with_large_pages(torch::stable::Tensor out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLarge = size_t{4} << 20, kPage = size_t{2} << 20;
  const size_t bytes = static_cast<size_t>(out.numel()) * out.element_size();
  if (bytes >= kLarge) {
    const auto start = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = (start + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

inline torch::stable::Tensor output_like(const torch::stable::Tensor& x) {
  return with_large_pages(torch::stable::empty_like(x));
}

}  // namespace aia::cpu
