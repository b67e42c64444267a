// The temporal shift: y copies x, with some channels from a frame ahead or behind. Bytes move, whatever their type.
#pragma once

#include <cstring>

#include "passes.h"

namespace aia::cpu {

constexpr int64_t kShiftChannels = 16;

// Units of the shift: blocks of channels of every frame or, where channels lie side by side, rows of every frame.
inline int64_t shift_units_of_frame(const Volume& x) {
  return channels_side_by_side(x) ? x.H : (x.C + kShiftChannels - 1) / kShiftChannels;
}
inline int64_t shift_units(const Volume& x) { return x.B * x.T * shift_units_of_frame(x); }

// The first fold channels of y [B, T, C, H, W] come `step` frames from their own (1 or -1), the next fold from as far
// on the other side, and the rest from their own; 0 where there is no such frame. See aia_kernels/schemas.py.
inline void temporal_shift(const Volume& x, int64_t itemsize, const char* data, int64_t fold, int64_t step, char* y,
                           int64_t begin, int64_t end) {
  const int64_t positions = x.H * x.W, ends[] = {fold, 2 * fold, x.C}, steps[] = {step, -step, 0};
  // n channels of frame t, `runs` times, `pitch` elements apart.
  const auto copy = [&](int64_t t, int64_t part, int64_t at, int64_t elements, int64_t runs, int64_t pitch) {
    const bool exists = t + steps[part] >= 0 && t + steps[part] < x.T;
    const char* source = data + (at + steps[part] * x.stride_t) * itemsize;
    char* target = y + at * itemsize;
    for (int64_t run = 0; run < runs; ++run, source += pitch * itemsize, target += pitch * itemsize) {
      if (exists)
        std::memcpy(target, source, elements * itemsize);
      else
        std::memset(target, 0, elements * itemsize);
    }
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const bool side_by_side = channels_side_by_side(x);
    const int64_t split = shift_units_of_frame(x), frame = unit / split, t = frame % x.T;
    const int64_t start = frame / x.T * x.stride_b + t * x.stride_t;
    const int64_t first = side_by_side ? 0 : unit % split * kShiftChannels;
    const int64_t last = side_by_side ? x.C : std::min(x.C, first + kShiftChannels);
    int64_t c = first;
    for (int64_t part = 0; part < 3; ++part) {
      const int64_t n = std::min(ends[part], last) - c;
      if (n <= 0) continue;
      if (side_by_side)
        copy(t, part, start + unit % split * x.W * x.stride_p + c, n, x.W, x.stride_p);
      else if (x.stride_c == positions)
        copy(t, part, start + c * positions, n * positions, 1, 0);
      else
        copy(t, part, start + c * x.stride_c, positions, n, x.stride_c);
      c += n;
    }
  }
}

}  // namespace aia::cpu
