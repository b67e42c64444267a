// The gate passes on the CPU: 3x3x3 convolution 2 -> 1, batch normalisation and sigmoid on packed maps, and their
// transposes. See aia_kernels/ops.py for what each computes.
//
// A row is the innermost axis of a map, the lanes run along it (channels, in spacetime maps). The convolution along
// the row is done last: first, for each of its three taps, the sum over the other two axes, S_k[c] = sum w[.., k] P[c];
// then z[c] = S_0[c - 1] + S_1[c] + S_2[c + 1]. So every load is shared by three products, none is shifted, and rows
// outside the map are skipped instead of padded. Two rows and nine neighbours make 54 multiply-adds per element.
#include <cmath>
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

// A row with zeros on both sides, so that neighbours beyond its ends read as padding.
template <class A>
class PaddedRow {
 public:
  explicit PaddedRow(int64_t length) : data_(length + 4 * kLanes, A(0)) {}
  A* operator()() { return data_.data() + kLanes; }
  void end_at(int64_t length) { std::fill_n(data_.data() + kLanes + length, 2 * kLanes, A(0)); }

 private:
  std::vector<A> data_;
};

// The taps that stay inside the map along one axis: the source index is d + k - 1.
struct Taps {
  int first, last;
  Taps(int64_t d, int64_t size) : first(d == 0), last(d + 1 < size ? 3 : 2) {}
};

// sums[k][block] += weight[.., k] * row, for kBlocks blocks of lanes.
template <class A, int kBlocks>
AIA_INLINE void add_row(Vec<A> (&sums)[3][kBlocks], const A* row, const A* weight, int lanes) {
  for (int j = 0; j < kBlocks; ++j) {
    const Vec<A> value = kBlocks == 1 ? load(row, lanes) : load(row + j * kLanes);
    for (int k = 0; k < 3; ++k) sums[k][j] += value * weight[k];
  }
}

// Blocks of one row's S_k: four vectors at a time, then one by one, the last one partial.
template <class A, class Body4, class Body1>
AIA_INLINE void for_blocks(int64_t length, Body4&& four, Body1&& one) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= length; c += 4 * kLanes) four(c);
  for (; c < length; c += kLanes) one(c, static_cast<int>(std::min<int64_t>(kLanes, length - c)));
}

template <class A>
Vec<A> exponential(Vec<A> v);

// exp by 2^n * p(r), |r| <= ln2 / 2: a Taylor polynomial of degree 7 errs by less than 2^-27 there.
template <>
AIA_INLINE Vec<float> exponential<float>(Vec<float> v) {
  v = v > 88.0f ? splat(88.0f) : v;
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
  return p * detail::bit_cast<Vec<float>>(exponent);
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

template <class A>
AIA_INLINE Vec<A> keep(Vec<A> v, int lanes) {
  return iota<A>() < splat_index<A>(lanes) ? v : Vec<A>{};
}

}  // namespace

template <class A>
void GatePasses<A>::conv(const PackedDims& maps, const A* pooled, const A* weight, A* z, double* partial,
                         int64_t begin, int64_t end) {
  const int64_t packed = maps.packed();
  int64_t longest = 0;
  for (int i = 0; i < maps.n; ++i) longest = std::max(longest, maps.dims[i][2]);
  PaddedRow<A> rows[3] = {PaddedRow<A>(longest), PaddedRow<A>(longest), PaddedRow<A>(longest)};
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t length = slab.length(), plane = slab.rows() * length;
    const A* maximum = pooled + slab.b * 2 * packed + slab.start();
    const A* w = weight + slab.map * 54;
    A* out = z + slab.b * packed + slab.start();
    const Taps t0(slab.d0, slab.dims[0]);
    for (int64_t d1 = 0; d1 < slab.rows(); ++d1) {
      const Taps t1(d1, slab.rows());
      const auto block = [&]<int kBlocks>(int64_t c, int lanes) {
        Vec<A> sums[3][kBlocks] = {};
        for (int i = 0; i < 2; ++i)
          for (int k0 = t0.first; k0 < t0.last; ++k0)
            for (int k1 = t1.first; k1 < t1.last; ++k1)
              add_row<A, kBlocks>(sums, maximum + i * packed + (k0 - 1) * plane + (d1 + k1 - 1) * length + c,
                                  w + ((i * 3 + k0) * 3 + k1) * 3, lanes);
        for (int k = 0; k < 3; ++k)
          for (int j = 0; j < kBlocks; ++j) store(rows[k]() + c + j * kLanes, sums[k][j]);
      };
      for_blocks<A>(
          length, [&](int64_t c) { block.template operator()<4>(c, kLanes); },
          [&](int64_t c, int lanes) { block.template operator()<1>(c, lanes); });
      for (PaddedRow<A>& row : rows) row.end_at(length);
      for (int64_t c = 0; c < length; c += kLanes)
        store(out + d1 * length + c, load(rows[0]() + c - 1) + load(rows[1]() + c) + load(rows[2]() + c + 1),
              static_cast<int>(std::min<int64_t>(kLanes, length - c)));
    }
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
    for_slab_vectors<A>(slab, [&](int64_t i, int n) {
      store(gate + start + i, bn.gate(bn.normalized(load(z + start + i, n))), n);
    });
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
  int64_t longest = 0, largest = 0;
  for (int i = 0; i < maps.n; ++i) {
    longest = std::max(longest, maps.dims[i][2]);
    largest = std::max(largest, maps.dims[i][1] * (maps.dims[i][2] + 4 * kLanes));
  }
  PaddedRow<A> rows[3] = {PaddedRow<A>(longest), PaddedRow<A>(longest), PaddedRow<A>(longest)};
  std::vector<A> padded(largest);
  for_each_slab(maps, begin, end, [&](const Slab& slab) {
    const int64_t length = slab.length(), plane = slab.rows() * length;
    const A* dz = grad_z + slab.b * packed + slab.start();
    const A* w = weight + slab.map * 54;
    const Taps t0(slab.d0, slab.dims[0]);
    // Correlation with the mirrored taps: output d reads dz at d - k + 1, which lies inside for the mirrored range.
    for (int i = 0; i < 2; ++i) {
      A* out = grad_pooled + (slab.b * 2 + i) * packed + slab.start();
      for (int64_t d1 = 0; d1 < slab.rows(); ++d1) {
        const Taps t1(d1, slab.rows());
        const auto block = [&]<int kBlocks>(int64_t c, int lanes) {
          Vec<A> sums[3][kBlocks] = {};
          for (int k0 = t0.first; k0 < t0.last; ++k0)
            for (int k1 = t1.first; k1 < t1.last; ++k1)
              add_row<A, kBlocks>(sums, dz + (k0 - 1) * plane + (d1 + k1 - 1) * length + c,
                                  w + ((i * 3 + 2 - k0) * 3 + 2 - k1) * 3, lanes);
          for (int k = 0; k < 3; ++k)
            for (int j = 0; j < kBlocks; ++j) store(rows[k]() + c + j * kLanes, sums[k][j]);
        };
        for_blocks<A>(
            length, [&](int64_t c) { block.template operator()<4>(c, kLanes); },
            [&](int64_t c, int lanes) { block.template operator()<1>(c, lanes); });
        for (PaddedRow<A>& row : rows) row.end_at(length);
        for (int64_t c = 0; c < length; c += kLanes)
          store(out + d1 * length + c, load(rows[0]() + c + 1) + load(rows[1]() + c) + load(rows[2]() + c - 1),
                static_cast<int>(std::min<int64_t>(kLanes, length - c)));
      }
    }
    // The weight: for each tap, the product of dz with the pooled row it met. dz moves against the taps of the row.
    const int64_t pitch = length + 4 * kLanes;
    std::fill_n(padded.data(), slab.rows() * pitch, A(0));
    for (int64_t d1 = 0; d1 < slab.rows(); ++d1)
      std::copy_n(dz + d1 * length, length, padded.data() + d1 * pitch + kLanes);
    double* grad_weight = partial + slab.index * kWeightPartials;
    std::fill_n(grad_weight, kWeightPartials, 0.0);
    for (int i = 0; i < 2; ++i) {
      for (int k0 = t0.first; k0 < t0.last; ++k0) {
        const A* source = pooled + (slab.b * 2 + i) * packed + slab.start() + (k0 - 1) * plane;
        Vec<A> sums[3][3] = {};
        for (int64_t s1 = 0; s1 < slab.rows(); ++s1) {  // the pooled row; dz is at s1 - k1 + 1
          const A* row = source + s1 * length;
          const A* near[3];
          for (int k1 = 0; k1 < 3; ++k1) {
            const int64_t d1 = s1 - k1 + 1;
            near[k1] = d1 >= 0 && d1 < slab.rows() ? padded.data() + d1 * pitch + kLanes : nullptr;
          }
          for (int64_t c = 0; c < length; c += kLanes) {
            const Vec<A> value = load(row + c, static_cast<int>(std::min<int64_t>(kLanes, length - c)));
            for (int k1 = 0; k1 < 3; ++k1)
              if (near[k1])
                for (int k2 = 0; k2 < 3; ++k2) sums[k1][k2] += value * load(near[k1] + c - k2 + 1);
          }
        }
        for (int k1 = 0; k1 < 3; ++k1)
          for (int k2 = 0; k2 < 3; ++k2) grad_weight[((i * 3 + k0) * 3 + k1) * 3 + k2] = sum_lanes<A>(sums[k1][k2]);
      }
    }
  });
}

template struct GatePasses<float>;
template struct GatePasses<double>;

}  // namespace aia::cpu::AIA_CPU_LEVEL
