// The gate passes on the CPU: 3x3x3 convolution 2 -> 1, batch normalisation and sigmoid on packed maps, and their
// transposes. See aia_kernels/schemas.py for what each computes.
//
// A row is the innermost axis of a map, the lanes run along it (channels, in spacetime maps). The convolution along
// the row is done last: first, for each of its three taps, the sum over the other two axes, S_k[c] = sum w[.., k] P[c];
// then z[c] = S_0[c - 1] + S_1[c] + S_2[c + 1]. So every load is shared by three products, none is shifted, and rows
// outside the map are skipped instead of padded. Two features and 27 neighbours make 54 multiply-adds per element. The
// transpose with respect to the features is the same correlation with the taps mirrored.
#include <vector>

#include "exponential.h"
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

// A row of a source that contributes to a row of the result, and its three weights.
template <class A>
struct Tap {
  const A *source, *weight;
};

// S_k of kBlocks vectors of a row: the sum over taps of weight[k] * source[at]. Every load is shared by three products.
template <class A, int kBlocks, class Lanes>
AIA_INLINE void sum_taps(const Tap<A>* tap, const Tap<A>* last, int64_t at, Lanes lanes, Vec<A> (&sums)[3][kBlocks]) {
  for (; tap < last; ++tap) {
    const Vec<A> w[3] = {splat(tap->weight[0]), splat(tap->weight[1]), splat(tap->weight[2])};
    for (int j = 0; j < kBlocks; ++j) {
      const Vec<A> value = in_register<A>(load(tap->source + at + j * kLanes, lanes));
      for (int k = 0; k < 3; ++k) sums[k][j] += value * w[k];
    }
  }
}

// out[d1][c] = sum over sources i and taps of weight[i][k0][k1][k2] * source(i, k0)[d1 + k1 - 1][c + k2 - 1], with
// source(i, k0) the slab before (k0 = 0), this one or the next, its rows `pitch` apart.
template <class A, class Source>
void correlate(const Slab& slab, int sources, const A* weight, Source&& source, int64_t pitch, A* out) {
  const int64_t length = slab.length();
  const Taps t0(slab.d0, slab.dims[0]);
  Tap<A> taps[18];  // by k1, then by slab, as the first row sees them: the first and last rows leave out one k1
  int count = 0;
  for (int k1 = 0; k1 < 3; ++k1)
    for (int i = 0; i < sources; ++i)
      for (int k0 = t0.first; k0 < t0.last; ++k0)
        taps[count++] = {source(i, k0) + (k1 - 1) * pitch, weight + ((i * 3 + k0) * 3 + k1) * 3};
  for (int64_t d1 = 0; d1 < slab.rows(); ++d1, out += length) {
    const Taps t1(d1, slab.rows());
    const Tap<A>*first = taps + t1.first * (count / 3), *last = taps + t1.last * (count / 3);
    // A vector is finished when its right neighbour is known: what it lacks till then, and what its neighbour needs.
    Vec<A> unfinished{}, s0{}, s2{};
    int64_t c = 0;
    const auto advance = [&](auto blocks, auto lanes) {
      constexpr int kBlocks = blocks;
      Vec<A> sums[3][kBlocks] = {};
      sum_taps<A, kBlocks>(first, last, d1 * pitch + c, lanes, sums);
      for (int j = 0; j < kBlocks; ++j, c += kLanes) {
        if (c) store(out + c - kLanes, unfinished + shift_down<A>(s2, sums[2][j]));
        unfinished = shift_up<A>(s0, sums[0][j]) + sums[1][j];
        s0 = sums[0][j], s2 = sums[2][j];
      }
    };
    constexpr std::integral_constant<int, kLanes> full;
    while (c + 4 * kLanes <= length) advance(std::integral_constant<int, 4>{}, full);
    while (c + kLanes <= length) advance(std::integral_constant<int, 1>{}, full);
    if (c < length) advance(std::integral_constant<int, 1>{}, static_cast<int>(length - c));
    c -= kLanes;
    store(out + c, unfinished + shift_down<A>(s2, Vec<A>{}), static_cast<int>(length - c));
  }
}

inline int64_t longest_row(const PackedDims& maps) {
  int64_t longest = 0;
  for (int i = 0; i < maps.n; ++i) longest = std::max(longest, maps.dims[i][2]);
  return longest;
}

template <class A>
struct Norm {
  A mean, rstd, weight, bias;
  explicit Norm(const A* row) : mean(row[0]), rstd(row[1]), weight(row[2]), bias(row[3]) {}
  AIA_INLINE Vec<A> normalized(Vec<A> z) const { return (z - mean) * rstd; }
  AIA_INLINE Vec<A> gate(Vec<A> normalized) const {
    return A(1) / (A(1) + exponential<A>(-(normalized * weight + bias)));
  }
  // du: the gradient of the sigmoid's argument from that of the gate.
  AIA_INLINE Vec<A> through_gate(Vec<A> grad_gate, Vec<A> normalized) const {
    const Vec<A> g = gate(normalized);
    return grad_gate * g * (A(1) - g);
  }
};

// Calls body(position, lanes) for the vectors of n contiguous elements.
template <class Body>
AIA_INLINE void for_vectors(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, std::integral_constant<int, kLanes>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// The sum of value(position, lanes) over n contiguous elements, by four chains of additions side by side.
template <class A, class Value>
AIA_INLINE A sum_over(int64_t n, Value&& value) {
  constexpr int kChains = 4;
  constexpr std::integral_constant<int, kLanes> full;
  Vec<A> sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int j = 0; j < kChains; ++j) sums[j] += value(i + j * kLanes, full);
  for_vectors(n - i, [&](int64_t rest, auto lanes) { sums[0] += value(i + rest, lanes); });
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Slabs of dz, each row with zeros on both sides, where the transposes of the convolution read it shifted. The three
// last ones are kept: a slab needs its neighbours, which are those of the next slab too.
template <class A>
class FramedSlabs {
 public:
  explicit FramedSlabs(const PackedDims& maps) {
    for (int i = 0; i < maps.n; ++i)
      capacity_ = std::max(capacity_, maps.dims[i][1] * pitch_of(maps.dims[i][2]) + kLanes);
    data_.resize(3 * capacity_);
  }

  static int64_t pitch_of(int64_t length) { return (length + 2 * kLanes - 1) / kLanes * kLanes; }

  // The rows of slab `index` among all, filled by fill(row, d1) where they are not there yet.
  template <class Fill>
  const A* rows(int64_t index, int64_t rows, int64_t length, Fill&& fill) {
    A* slab = data_.data() + index % 3 * capacity_ + kLanes;
    if (held_[index % 3] != index) {
      held_[index % 3] = index;
      store(slab - kLanes, Vec<A>{});
      for (int64_t d1 = 0; d1 < rows; ++d1) {
        A* row = slab + d1 * pitch_of(length);
        store(row + pitch_of(length) - kLanes, Vec<A>{});
        fill(row, d1);
        std::fill(row + length, row + pitch_of(length), A(0));
      }
    }
    return slab;
  }

 private:
  int64_t capacity_ = 0, held_[3] = {-1, -1, -1};
  std::vector<A> data_;
};

// out[i][k1][k2] = sum over d, c of features[i][d + k1 - 1][c] * dz[d][c - k2 + 1], the products of the weight's taps
// in one plane. Outside the slab features are zero, above and below, and dz is, to the left and right.
template <class A>
void weight_taps(const A* const (&features)[2], const A* zeros, const A* dz, int64_t rows, int64_t length,
                 double* out) {
  Vec<A> sums[2][3][3] = {};
  for (int64_t d = 0; d < rows; ++d, dz += FramedSlabs<A>::pitch_of(length)) {
    const A* feature[2][3];
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 3; ++k)
        feature[i][k] = d + k >= 1 && d + k <= rows ? features[i] + (d + k - 1) * length : zeros;
    for_vectors(length, [&](int64_t c, auto lanes) {
      const Vec<A> near[3] = {in_register<A>(load(dz + c + 1)), in_register<A>(load(dz + c)),
                              in_register<A>(load(dz + c - 1))};
      for (int i = 0; i < 2; ++i)
        for (int k1 = 0; k1 < 3; ++k1) {
          const Vec<A> value = in_register<A>(load(feature[i][k1] + c, lanes));
          for (int k2 = 0; k2 < 3; ++k2) sums[i][k1][k2] += value * near[k2];
        }
    });
  }
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 9; ++k) out[i * 27 + k] = sum_lanes<A>(sums[i][k / 3][k % 3]);
}

template <class A>
AIA_INLINE Vec<A> keep(Vec<A> v, std::integral_constant<int, kLanes>) {
  return v;
}
template <class A>
AIA_INLINE Vec<A> keep(Vec<A> v, int lanes) {
  return iota<A>() < splat_index<A>(lanes) ? v : Vec<A>{};
}

// z = conv(pooled) of one slab.
template <class A>
void convolve(const PackedDims& maps, const Slab& slab, const A* pooled, const A* weight, A* z) {
  const int64_t length = slab.length(), plane = slab.rows() * length;
  const A* maximum = pooled + slab.b * 2 * maps.packed() + slab.start();
  correlate(
      slab, 2, weight + slab.map * 54, [&](int i, int k0) { return maximum + i * maps.packed() + (k0 - 1) * plane; },
      length, z);
}

// The gates of one slab; they may overwrite z.
template <class A>
void activate_slab(const Norm<A>& bn, const A* z, int64_t count, A* gate) {
  for_vectors(count, [&](int64_t i, auto n) { store(gate + i, bn.gate(bn.normalized(load(z + i, n))), n); });
}

template <class A>
void conv(const PackedDims& maps, const A* pooled, const A* weight, A* z, double* partial, int64_t begin, int64_t end) {
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t plane = slab.rows() * slab.length();
    A* out = z + slab.b * maps.packed() + slab.start();
    convolve(maps, slab, pooled, weight, out);
    const A sum = sum_over<A>(plane, [&](int64_t i, auto n) { return load(out + i, n); });
    const A mean = sum / static_cast<A>(plane);
    Vec<A> deviations{};  // of which the sum tells how far the rounded mean is off
    const A squares = sum_over<A>(plane, [&](int64_t i, auto n) {
      const Vec<A> deviation = keep<A>(load(out + i, n) - mean, n);
      deviations += deviation;
      return deviation * deviation;
    });
    const double count = static_cast<double>(plane), off = sum_lanes<A>(deviations) / count;
    double* moments = partial + slab.index * kMomentPartials;
    moments[0] = count, moments[1] = mean + off, moments[2] = squares - off * off * count;
  });
}

template <class A>
void conv_activate(const PackedDims& maps, const A* pooled, const A* weight, const A* norm, A* z, A* gate,
                   int64_t begin, int64_t end) {
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t start = slab.b * maps.packed() + slab.start(), plane = slab.rows() * slab.length();
    convolve(maps, slab, pooled, weight, z + start);
    activate_slab(Norm<A>(norm + slab.map * 4), z + start, plane, gate + start);
  });
}

template <class A>
void activate(const PackedDims& maps, const A* z, const A* norm, A* gate, int64_t begin, int64_t end) {
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t start = slab.b * maps.packed() + slab.start();
    activate_slab(Norm<A>(norm + slab.map * 4), z + start, slab.rows() * slab.length(), gate + start);
  });
}

template <class A>
void backward_reduce(const PackedDims& maps, const A* grad_gate, const A* z, const A* norm, double* partial,
                     int64_t begin, int64_t end) {
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t start = slab.b * maps.packed() + slab.start();
    const Norm<A> bn(norm + slab.map * 4);
    Vec<A> sum{}, sum_normalized{};
    for_vectors(slab.rows() * slab.length(), [&](int64_t i, auto n) {
      const Vec<A> normalized = bn.normalized(load(z + start + i, n));
      const Vec<A> du = keep<A>(bn.through_gate(load(grad_gate + start + i, n), normalized), n);
      sum += du;
      sum_normalized += du * normalized;
    });
    double* sums = partial + slab.index * kNormPartials;
    sums[0] = sum_lanes<A>(sum), sums[1] = sum_lanes<A>(sum_normalized);
  });
}

template <class A>
void backward(const PackedDims& maps, const A* grad_gate, const A* z, const A* norm, const A* correction,
              const A* pooled, const A* weight, A* grad_pooled, double* partial, int64_t begin, int64_t end) {
  const int64_t packed = maps.packed();
  FramedSlabs<A> framed(maps);
  const std::vector<A> zeros(longest_row(maps), A(0));
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t length = slab.length(), plane = slab.rows() * length;
    const Norm<A> bn(norm + slab.map * 4);
    const A scale = bn.weight * bn.rstd;
    const A mean_du = correction[slab.map * 2], mean_du_normalized = correction[slab.map * 2 + 1];
    const bool corrected = mean_du_normalized != A(0);  // else an infinite z would make a NaN of the zero
    const Taps t0(slab.d0, slab.dims[0]);
    const A* dz[3] = {};  // of the slab before, this one and the next
    for (int k0 = t0.first; k0 < t0.last; ++k0) {
      const int64_t start = slab.b * packed + slab.start() + (k0 - 1) * plane;
      dz[k0] = framed.rows(slab.index + k0 - 1, slab.rows(), length, [&](A* row, int64_t d1) {
        const int64_t first = start + d1 * length;
        for_vectors(length, [&](int64_t i, auto n) {
          const Vec<A> normalized = bn.normalized(load(z + first + i, n));
          const Vec<A> du = bn.through_gate(load(grad_gate + first + i, n), normalized);
          store(row + i, (du - mean_du - (corrected ? normalized * mean_du_normalized : Vec<A>{})) * scale, n);
        });
      });
    }
    for (int i = 0; i < 2; ++i) {
      A mirrored[27];
      for (int k = 0; k < 27; ++k) mirrored[k] = weight[slab.map * 54 + i * 27 + 26 - k];
      correlate(
          slab, 1, mirrored, [&](int, int k0) { return dz[k0]; }, FramedSlabs<A>::pitch_of(length),
          grad_pooled + (slab.b * 2 + i) * packed + slab.start());
    }
    double* grad_weight = partial + slab.index * kWeightPartials;
    std::fill_n(grad_weight, kWeightPartials, 0.0);
    for (int k0 = t0.first; k0 < t0.last; ++k0) {
      const A* maximum = pooled + slab.b * 2 * packed + slab.start() + (k0 - 1) * plane;
      weight_taps({maximum, maximum + packed}, zeros.data(), dz[1], slab.rows(), length, grad_weight + k0 * 9);
    }
  });
}

template <class A>
constexpr GatePasses<A> kPasses = {conv<A>, activate<A>, conv_activate<A>, backward_reduce<A>, backward<A>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

template <class A>
const GatePasses<A> GatePasses<A>::AIA_CPU_LEVEL = kPasses<A>;
template struct GatePasses<float>;
template struct GatePasses<double>;

}  // namespace aia::cpu
