// A whole unit with fixed statistics, forward only: y = x * G_outer(x * G_inner(x)), clip by clip. There are two ways,
// and evaluate.cu says what each costs.
#pragma once

#include "passes.h"

namespace aia::cuda {

// The contexts of a unit and the gates of each: inner may be kNone, outer is the other of the two. The statistics of
// the gates are fixed.
struct UnitGates {
  int inner, outer;
  const GateParameters *inner_gates, *outer_gates;
};

// Writes how many blocks of a cluster keep a clip on chip on the current device; 0 where no number does. Returns the
// error code of the device when it is asked.
int cluster_size(const Shape&, int inner, int outer, int* cluster);

// In clusters of so many blocks, a number that fits.
int evaluate_in_clusters(const Shape&, const void* x, const UnitGates&, void* y, int cluster, void* stream);

// By the passes, group after group of so many clips. The maps of a group lie in `workspace`, of group_bytes.
int64_t clips_in_cache(const Shape&);
int64_t group_bytes(const Shape&, int64_t clips);
int evaluate_in_groups(const Shape&, const void* x, const UnitGates&, void* y, int64_t clips, void* workspace,
                       void* stream);

}  // namespace aia::cuda
