// The gate passes on the CPU: 3x3x3 convolution 2 -> 1, batch normalisation and sigmoid on packed maps, and their
// transposes. See aia_kernels/ops.py for what each computes.
//
// A row is the innermost axis of a map, the lanes run along it (channels, in spacetime maps). The convolution along
// the row is done last: first, for each of its three taps, the sum over the other two axes, S_k[c] = sum w[.., k] P[c];
// then z[c] = S_0[c - 1] + S_1[c] + S_2[c + 1]. So every load is shared by three products, none is shifted, and rows
// outside the map are skipped instead of padded. Two features and 27 neighbours make 54 multiply-adds per element. The
// transpose with respect to the features is the same correlation with the taps mirrored.
#include <cmath>
#include <limits>
#include <vector>

#include "tile.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// A slab of one map of one clip: its outermost index and where it lies.
struct Slab {
  int map;
  int64_t b, d0;
  const int64_t* dims;
  int64_t offset;  // of the map in the packed clip
  int64_t index;   // among all slabs

  int64_t rows() const { return dims[1]; }
  int64_t length() const { return dims[2]; }
  int64_t start() const { return offset + d0 * dims[1] * dims[2]; }
};

template <class Each>
void for_each_slab(const PackedDims& maps, int64_t begin, int64_t end, Each&& each) {
  for (int64_t index = begin; index < end; ++index) {
    int64_t local = index;
    int map = 0;
    while (local >= maps.B * maps.dims[map][0]) local -= maps.B * maps.dims[map++][0];
    const int64_t d0 = local % maps.dims[map][0], b = local / maps.dims[map][0];
    each(Slab{map, b, d0, maps.dims[map], maps.offset(map), index});
  }
}

// The taps that stay inside the map along one axis: the source index is d + k - 1.
struct Taps {
  int first, last;
  Taps(int64_t d, int64_t size) : first(d == 0), last(d + 1 < size ? 3 : 2) {}
};

// out[d1][c] = sum over sources and taps of weight[source][k0][k1][k2] * source[k0 - 1][d1 + k1 - 1][c + k2 - 1], where
// sources point to the slab itself and their neighbours lie a plane before and behind.
template <class A>
class Correlation {
 public:
  explicit Correlation(int64_t longest) : pitch_(longest + 4 * kLanes), rows_(6 * pitch_, A(0)) {}

  void operator()(const Slab& slab, const A* const* sources, int count, const A* weight, A* out) {
    const int64_t length = slab.length();
    const Taps t0(slab.d0, slab.dims[0]);
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 3; ++k) std::fill_n(row(half, k) + length, 2 * kLanes, A(0));
    // A row is finished one row late: reading shifted what was stored just before would wait for the stores.
    for (int64_t d1 = 0; d1 <= slab.rows(); ++d1) {
      if (d1 < slab.rows()) {
        const Taps t1(d1, slab.rows());
        int64_t c = 0;
        for (; c + 4 * kLanes <= length; c += 4 * kLanes)
          partial_sums<4>(slab, sources, count, weight, t0, t1, d1, c, std::integral_constant<int, kLanes>{});
        for (; c + kLanes <= length; c += kLanes)
          partial_sums<1>(slab, sources, count, weight, t0, t1, d1, c, std::integral_constant<int, kLanes>{});
        if (c < length) partial_sums<1>(slab, sources, count, weight, t0, t1, d1, c, static_cast<int>(length - c));
      }
      if (d1 > 0) finish(d1 - 1, length, out + (d1 - 1) * length);
    }
  }

 private:
  A* row(int64_t d1, int k) { return rows_.data() + (d1 % 2 * 3 + k) * pitch_ + kLanes; }

  template <int kBlocks, class Lanes>
  AIA_INLINE void partial_sums(const Slab& slab, const A* const* sources, int count, const A* weight, Taps t0, Taps t1,
                               int64_t d1, int64_t c, Lanes lanes) {
    const int64_t length = slab.length(), plane = slab.rows() * length;
    Vec<A> sums[3][kBlocks] = {};
    for (int i = 0; i < count; ++i)
      for (int k0 = t0.first; k0 < t0.last; ++k0)
        for (int k1 = t1.first; k1 < t1.last; ++k1) {
          const A* source = sources[i] + (k0 - 1) * plane + (d1 + k1 - 1) * length + c;
          const A* w = weight + ((i * 3 + k0) * 3 + k1) * 3;
          for (int j = 0; j < kBlocks; ++j) {
            const Vec<A> value = load(source + j * kLanes, lanes);
            for (int k = 0; k < 3; ++k) sums[k][j] += value * w[k];
          }
        }
    for (int k = 0; k < 3; ++k)
      for (int j = 0; j < kBlocks; ++j) store(row(d1, k) + c + j * kLanes, sums[k][j]);
  }

  void finish(int64_t d1, int64_t length, A* out) {
    const A *before = row(d1, 0) - 1, *here = row(d1, 1), *after = row(d1, 2) + 1;
    int64_t c = 0;
    for (; c + kLanes <= length; c += kLanes) store(out + c, load(before + c) + load(here + c) + load(after + c));
    if (c < length) store(out + c, load(before + c) + load(here + c) + load(after + c), static_cast<int>(length - c));
  }

  int64_t pitch_;
  std::vector<A> rows_;  // S_k of two consecutive rows, each with zeros on both sides
};

inline int64_t longest_row(const PackedDims& maps) {
  int64_t longest = 0;
  for (int i = 0; i < maps.n; ++i) longest = std::max(longest, maps.dims[i][2]);
  return longest;
}

template <class A>
Vec<A> exponential(Vec<A> v);

// exp by 2^n * p(r), |r| <= ln2 / 2: a Taylor polynomial of degree 7 errs by less than 2^-27 there. Above 88, where the
// scale would soon overflow, it is infinity: a sigmoid is 0 from there on.
template <>
AIA_INLINE Vec<float> exponential<float>(Vec<float> argument) {
  Vec<float> v = argument > 88.0f ? splat(88.0f) : argument;
  v = v < -87.0f ? splat(-87.0f) : v;
  const Vec<float> shifted = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IVec<float> exponent = (detail::bit_cast<IVec<float>>(shifted) - 0x4b400000 + 127) << 23;
  const Vec<float> result = p * detail::bit_cast<Vec<float>>(exponent);
  return argument > 88.0f ? splat(std::numeric_limits<float>::infinity()) : result;
}
template <>
AIA_INLINE Vec<double> exponential<double>(Vec<double> v) {
  for (int i = 0; i < kLanes; ++i) v[i] = std::exp(v[i]);
  return v;
}

template <class A>
struct Norm {
  A mean, rstd, weight, bias;
  explicit Norm(const A* row) : mean(row[0]), rstd(row[1]), weight(row[2]), bias(row[3]) {}
  AIA_INLINE Vec<A> normalized(Vec<A> z) const { return (z - mean) * rstd; }
  AIA_INLINE Vec<A> gate(Vec<A> normalized) const {
    return A(1) / (A(1) + exponential<A>(-(normalized * weight + bias)));
  }
};

// Calls body(position, lanes) for the vectors of a slab, which is contiguous.
template <class A, class Body>
AIA_INLINE void for_slab_vectors(const Slab& slab, Body&& body) {
  const int64_t size = slab.rows() * slab.length();
  for (int64_t i = 0; i < size; i += kLanes) body(i, static_cast<int>(std::min<int64_t>(kLanes, size - i)));
}

// out[i][k1][k2] = sum over d, c of features[i][d + k1 - 1][c] * framed[d][c - k2 + 1], the products of the weight's
// taps in one plane: features are rows without a frame (zeros stand in above and below), framed has zeros on both
// sides.
template <class A>
void weight_taps(const A* const (&features)[2], const A* framed, const A* zeros, int64_t rows, int64_t length,
                 int64_t pitch, double* out) {
  Vec<A> sums[2][3][3] = {};
  for (int64_t d = 0; d < rows; ++d) {
    const A* feature[2][3];
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 3; ++k)
        feature[i][k] = d + k >= 1 && d + k <= rows ? features[i] + (d + k - 1) * length : zeros;
    const A* dz = framed + d * pitch;
    const auto add = [&](int64_t c, auto n) {
      const Vec<A> near[3] = {load(dz + c + 1), load(dz + c), load(dz + c - 1)};
      for (int i = 0; i < 2; ++i)
        for (int k1 = 0; k1 < 3; ++k1) {
          const Vec<A> value = load(feature[i][k1] + c, n);
          for (int k2 = 0; k2 < 3; ++k2) sums[i][k1][k2] += value * near[k2];
        }
    };
    int64_t c = 0;
    for (; c + kLanes <= length; c += kLanes) add(c, std::integral_constant<int, kLanes>{});
    if (c < length) add(c, static_cast<int>(length - c));
  }
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 9; ++k) out[i * 27 + k] = sum_lanes<A>(sums[i][k / 3][k % 3]);
}

template <class A>
AIA_INLINE Vec<A> keep(Vec<A> v, int lanes) {
  return iota<A>() < splat_index<A>(lanes) ? v : Vec<A>{};
}

}  // namespace

template <class A>
void GatePasses<A>::conv(const PackedDims& maps, const A* pooled, const A* weight, A* z, double* partial, int64_t begin,
                         int64_t end) {
  Correlation<A> correlation(longest_row(maps));
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t plane = slab.rows() * slab.length();
    const A* maximum = pooled + slab.b * 2 * maps.packed() + slab.start();
    const A* features[2] = {maximum, maximum + maps.packed()};
    A* out = z + slab.b * maps.packed() + slab.start();
    correlation(slab, features, 2, weight + slab.map * 54, out);
    Vec<A> sum{}, squares{};
    for_slab_vectors<A>(slab, [&](int64_t i, int n) { sum += load(out + i, n); });
    const A mean = sum_lanes<A>(sum) / static_cast<A>(plane);
    for_slab_vectors<A>(slab, [&](int64_t i, int n) {
      const Vec<A> deviation = keep<A>(load(out + i, n) - mean, n);
      squares += deviation * deviation;
    });
    double* moments = partial + slab.index * kMomentPartials;
    moments[0] = static_cast<double>(plane), moments[1] = mean, moments[2] = sum_lanes<A>(squares);
  });
}

template <class A>
void GatePasses<A>::activate(const PackedDims& maps, const A* z, const A* norm, A* gate, int64_t begin, int64_t end) {
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t start = slab.b * maps.packed() + slab.start();
    const Norm<A> bn(norm + slab.map * 4);
    for_slab_vectors<A>(
        slab, [&](int64_t i, int n) { store(gate + start + i, bn.gate(bn.normalized(load(z + start + i, n))), n); });
  });
}

template <class A>
void GatePasses<A>::backward_reduce(const PackedDims& maps, const A* grad_gate, const A* z, const A* norm,
                                    double* partial, int64_t begin, int64_t end) {
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t start = slab.b * maps.packed() + slab.start();
    const Norm<A> bn(norm + slab.map * 4);
    Vec<A> sum{}, sum_normalized{};
    for_slab_vectors<A>(slab, [&](int64_t i, int n) {
      const Vec<A> normalized = bn.normalized(load(z + start + i, n)), g = bn.gate(normalized);
      const Vec<A> du = keep<A>(load(grad_gate + start + i, n) * g * (A(1) - g), n);
      sum += du;
      sum_normalized += du * normalized;
    });
    double* sums = partial + slab.index * kNormPartials;
    sums[0] = sum_lanes<A>(sum), sums[1] = sum_lanes<A>(sum_normalized);
  });
}

template <class A>
void GatePasses<A>::backward_norm(const PackedDims& maps, const A* grad_gate, const A* z, const A* norm,
                                  const A* correction, A* grad_z, int64_t begin, int64_t end) {
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t start = slab.b * maps.packed() + slab.start();
    const Norm<A> bn(norm + slab.map * 4);
    const A scale = bn.weight * bn.rstd;
    const A mean_du = correction[slab.map * 2], mean_du_normalized = correction[slab.map * 2 + 1];
    for_slab_vectors<A>(slab, [&](int64_t i, int n) {
      const Vec<A> normalized = bn.normalized(load(z + start + i, n)), g = bn.gate(normalized);
      const Vec<A> du = load(grad_gate + start + i, n) * g * (A(1) - g);
      store(grad_z + start + i, (du - mean_du - normalized * mean_du_normalized) * scale, n);
    });
  });
}

template <class A>
void GatePasses<A>::backward_conv(const PackedDims& maps, const A* grad_z, const A* pooled, const A* weight,
                                  A* grad_pooled, double* partial, int64_t begin, int64_t end) {
  const int64_t packed = maps.packed();
  int64_t largest = 0;
  for (int i = 0; i < maps.n; ++i) largest = std::max(largest, maps.dims[i][1] * (maps.dims[i][2] + 4 * kLanes));
  Correlation<A> correlation(longest_row(maps));
  std::vector<A> frame(largest), zeros(longest_row(maps) + kLanes, A(0));
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t length = slab.length(), plane = slab.rows() * length;
    const A* dz = grad_z + slab.b * packed + slab.start();
    A mirrored[54];
    for (int i = 0; i < 54; ++i) mirrored[i] = weight[slab.map * 54 + i / 27 * 27 + 26 - i % 27];
    for (int i = 0; i < 2; ++i)
      correlation(slab, &dz, 1, mirrored + i * 27, grad_pooled + (slab.b * 2 + i) * packed + slab.start());
    const int64_t pitch = length + 4 * kLanes;
    A* framed = frame.data() + kLanes;
    std::fill_n(frame.data(), slab.rows() * pitch, A(0));
    for (int64_t d1 = 0; d1 < slab.rows(); ++d1) std::copy_n(dz + d1 * length, length, framed + d1 * pitch);
    double* grad_weight = partial + slab.index * kWeightPartials;
    std::fill_n(grad_weight, kWeightPartials, 0.0);
    const Taps t0(slab.d0, slab.dims[0]);
    for (int k0 = t0.first; k0 < t0.last; ++k0) {
      const A* maximum = pooled + slab.b * 2 * packed + slab.start() + (k0 - 1) * plane;
      weight_taps({maximum, maximum + packed}, framed, zeros.data(), slab.rows(), length, pitch, grad_weight + k0 * 9);
    }
  });
}

template struct GatePasses<float>;
template struct GatePasses<double>;

}  // namespace aia::cpu::AIA_CPU_LEVEL
