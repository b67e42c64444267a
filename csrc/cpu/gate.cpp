// The gate passes on the CPU: 3x3x3 convolution 2 -> 1, batch normalisation and sigmoid on packed maps, and their
// transposes. See aia_kernels/schemas.py for what each computes.
//
// A map is copied, box by box, to a stream in which a zero follows each row and a row of zeros each slab. Then
// every neighbour of an element is a fixed distance away, whatever the lengths of the axes, and the lanes run along the
// stream. The convolution along the row is done last: first, for each of its three taps, the sum over the other two
// axes, S_k[i] = sum w[.., k] P[i + ..]; then z[i] = S_0[i - 1] + S_1[i] + S_2[i + 1]. So every load is shared by three
// products. Two features and 27 neighbours make 54 multiply-adds per element. The transpose with respect to the
// features is the same correlation with the taps mirrored.
#include <vector>

#include "exponential.h"
#include "planes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// Rows [d1, d1 + rows) of the slabs [d0, d0 + slabs) of one map of one clip: the unit of these passes.
struct Box {
  int map;
  int64_t b, d0, slabs, d1, rows;
  const int64_t* dims;
  int64_t offset;  // of the map in the packed clip
  int64_t index;   // among all units

  bool whole() const { return rows == dims[1]; }
  int64_t length() const { return dims[2]; }
  int64_t plane() const { return dims[1] * dims[2]; }
  int64_t start() const { return offset + d0 * plane() + d1 * length(); }
  int64_t size() const { return slabs * rows * length(); }
  int64_t ahead() const { return whole() ? size() : rows * length(); }  // to the next unit
  // Of rows and slabs in the stream. Whole slabs share the row of zeros between them; others have neighbours there.
  int64_t pitch() const { return length() + 1; }
  int64_t slab_pitch() const { return (rows + (whole() ? 1 : 2)) * pitch(); }
};

// The box of a unit among all, of which the last ones may be smaller than the others.
inline Box box_at(const PackedDims& maps, int64_t index) {
  int64_t local = index;
  int map = 0;
  while (local >= maps.B * map_units(maps, map)) local -= maps.B * map_units(maps, map++);
  const int64_t* dims = maps.dims[map];
  const UnitSize unit = unit_size(maps, map);
  const int64_t across = (dims[1] + unit.rows - 1) / unit.rows, of_clip = local % map_units(maps, map);
  const int64_t d0 = of_clip / across * unit.slabs, d1 = of_clip % across * unit.rows;
  return {map,  local / map_units(maps, map),      d0,   std::min(unit.slabs, dims[0] - d0),
          d1,   std::min(unit.rows, dims[1] - d1), dims, maps.offset(map),
          index};
}

// Calls each(box).
template <class Each>
void for_each_box(const PackedDims& maps, int64_t begin, int64_t end, Each&& each) {
  for (int64_t index = begin; index < end; ++index) each(box_at(maps, index));
}

// Calls body(offset, n) for the pieces of the packed clip that a box is: n elements side by side.
template <class Body>
AIA_INLINE void for_pieces(const Box& at, Body&& body) {
  if (at.whole()) return body(at.start(), at.size());
  for (int64_t s = 0; s < at.slabs; ++s) body(at.start() + s * at.plane(), at.rows * at.length());
}

// The first lanes; zero in the others.
template <class A>
AIA_INLINE Vec<A> keep(Vec<A> v, std::integral_constant<int, kLanes>) {
  return v;
}
template <class A>
AIA_INLINE Vec<A> keep(Vec<A> v, int lanes) {
  return iota<A>() < splat_index<A>(lanes) ? v : Vec<A>{};
}

constexpr int kBlocks = 4;  // vectors of the stream that are convolved at a time

// A box as a stream, with its neighbours.
template <class A>
class Stream {
 public:
  explicit Stream(const PackedDims& maps) {
    int64_t capacity = 0;
    for (int i = 0; i < maps.n; ++i) {
      const UnitSize unit = unit_size(maps, i);
      const Box at{i, 0, 0, unit.slabs, 0, unit.rows, maps.dims[i], 0, 0};
      capacity = std::max(capacity, (unit.slabs + 2) * (at.slab_pitch() + at.pitch()) + lead(at) + tail(at) + kLanes);
    }
    data_.resize(capacity);
  }

  // The first element of the box.
  A* begin(const Box& at) { return data_.data() + lead(at) + at.slab_pitch() + (at.whole() ? 0 : at.pitch()); }

  // Fills the stream with value(offset in the packed clip, lanes); `elements` of what it loads from follow the clip.
  template <class Value>
  void fill(const PackedDims& maps, const Box& at, int64_t elements, Value&& value) {
    const int64_t length = at.length(), pitch = at.pitch(), end = maps.packed() + elements;
    const int64_t above = at.whole() ? 0 : -1, first = std::max(above, -at.d1),
                  last = std::min(at.rows + 1, at.dims[1] - at.d1);
    A* to = zeros(data_.data(), lead(at));
    for (int64_t s = -1; s <= at.slabs; ++s) {
      if (at.d0 + s < 0 || at.d0 + s >= at.dims[0]) {
        to = zeros(to, at.slab_pitch());
        continue;
      }
      to = zeros(to, (first - above) * pitch);
      const int64_t from = at.start() + s * at.plane() + first * length;
      for_rows(last - first, length, end - from, [&](int64_t r, int64_t i, auto lanes) {
        const Vec<A> v = value(from + r * length + i, lanes);
        store(to + r * pitch + i, length < kLanes ? keep<A>(v, static_cast<int>(length)) : v);
        to[r * pitch + length] = A(0);
      });
      to = zeros(to + (last - first) * pitch, (at.rows + 1 - last) * pitch);
    }
    zeros(to, tail(at));
  }

 private:
  static int64_t lead(const Box& at) { return at.pitch() + kLanes; }
  static int64_t tail(const Box& at) { return 2 * at.pitch() + (kBlocks + 2) * kLanes; }
  static A* zeros(A* to, int64_t n) {  // by whole vectors: what follows is written later
    for (int64_t i = 0; i < n; i += kLanes) store(to + i, Vec<A>{});
    return to + n;
  }

  std::vector<A> data_;
};

// What of a stream belongs to the box, to the packed clip.
template <class A>
void unpad(const Box& at, const A* stream, A* clip) {
  const int64_t length = at.length(), rows = at.rows, slabs = at.slabs, pitch = at.pitch(), slab = at.slab_pitch();
  for (int64_t s = 0; s < slabs; ++s) {
    const A* from = stream + s * slab;
    A* out = clip + at.start() + s * at.plane();
    for_rows(rows, length, rows * length,
             [&](int64_t r, int64_t i, auto lanes) { store(out + r * length + i, load(from + r * pitch + i), lanes); });
  }
}

// A neighbour of an element, and the three weights of its row.
template <class A>
struct Tap {
  const A *source, *weight;
};

// S_k of kBlocks vectors of the stream: the sum over taps of weight[k] * source[at].
template <class A>
AIA_INLINE void sum_taps(const Tap<A>* tap, int count, int64_t at, Vec<A> (&sums)[3][kBlocks]) {
  for (const Tap<A>* last = tap + count; tap < last; ++tap) {
    const Vec<A> w[3] = {splat(tap->weight[0]), splat(tap->weight[1]), splat(tap->weight[2])};
    for (int j = 0; j < kBlocks; ++j) {
      const Vec<A> value = in_register<A>(load(tap->source + at + j * kLanes));
      for (int k = 0; k < 3; ++k) sums[k][j] += value * w[k];
    }
  }
}

// out[i] = sum over sources and taps of weight[source][k0][k1][k2] * source[i + k0 - 1 slabs + k1 - 1 rows + k2 - 1].
template <class A>
void correlate(const Box& at, std::initializer_list<const A*> sources, const A* weight, A* out) {
  Tap<A> taps[18];
  int count = 0;
  for (const A* source : sources)
    for (int64_t k0 = -1; k0 <= 1; ++k0)
      for (int64_t k1 = -1; k1 <= 1; ++k1, ++count)
        taps[count] = {source + k0 * at.slab_pitch() + k1 * at.pitch(), weight + 3 * count};
  // A vector is finished when its right neighbour is known: what it lacks till then, and what its neighbour needs.
  Vec<A> unfinished{}, s0{}, s2{};
  const int64_t n = at.slabs * at.slab_pitch();
  for (int64_t i = 0; i < n + kLanes; i += kBlocks * kLanes) {
    Vec<A> sums[3][kBlocks] = {};
    sum_taps<A>(taps, count, i, sums);
    for (int j = 0; j < kBlocks; ++j) {
      store(out + i + (j - 1) * kLanes, unfinished + shift_down<A>(s2, sums[2][j]));
      unfinished = shift_up<A>(s0, sums[0][j]) + sums[1][j];
      s0 = sums[0][j], s2 = sums[2][j];
    }
  }
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

// out[k1][k2] = sum over the box of features[i + k1 - 1 rows] * dz[i - k2 + 1], the products of the weight's taps in
// one plane. Both are streams, so the products to the left and right of a row are zero.
template <class A>
void weight_taps(const Box& at, const A* features, const A* dz, double* out) {
  const int64_t pitch = at.pitch(), slab = at.slab_pitch(), slabs = at.slabs, n = at.rows * pitch;
  Vec<A> sums[3][3] = {};
  for (int64_t s = 0; s < slabs; ++s, features += slab, dz += slab)
    for_vectors(n, [&](int64_t i, auto lanes) {
      const Vec<A> near[3] = {in_register<A>(load(dz + i + 1)), in_register<A>(load(dz + i)),
                              in_register<A>(load(dz + i - 1))};
      for (int k1 = 0; k1 < 3; ++k1) {
        const Vec<A> value = in_register<A>(keep<A>(load(features + i + (k1 - 1) * pitch), lanes));
        for (int k2 = 0; k2 < 3; ++k2) sums[k1][k2] += value * near[k2];
      }
    });
  for (int k = 0; k < 9; ++k) out[k] = sum_lanes<A>(sums[k / 3][k % 3]);
}

// Both features of a box, as streams.
template <class A>
struct Features {
  Stream<A> maximum, mean;

  explicit Features(const PackedDims& maps) : maximum(maps), mean(maps) {}
  void fill(const PackedDims& maps, const Box& at, const A* pooled) {
    const int64_t packed = maps.packed(), clips = (maps.B - at.b - 1) * 2 * packed;
    const A* clip = pooled + at.b * 2 * packed;
    const auto load_from = [ahead = at.ahead()](const A* feature) {
      return [=](int64_t i, auto n) { return load_ahead(feature + i, ahead, n); };
    };
    maximum.fill(maps, at, clips + packed, load_from(clip));
    mean.fill(maps, at, clips, load_from(clip + packed));
  }
};

// z = conv(pooled), box by box, to the packed clip.
template <class A>
class Convolution {
 public:
  explicit Convolution(const PackedDims& maps) : features_(maps), result_(maps) {}

  void operator()(const PackedDims& maps, const Box& at, const A* pooled, const A* weight, A* clip) {
    features_.fill(maps, at, pooled);
    A* stream = result_.begin(at);
    correlate<A>(at, {features_.maximum.begin(at), features_.mean.begin(at)}, weight + at.map * 54, stream);
    unpad(at, stream, clip);
  }

 private:
  Features<A> features_;
  Stream<A> result_;
};

// The gates of a box; they may overwrite z.
template <class A>
void activate_box(const Norm<A>& bn, const Box& at, const A* z, A* gate) {
  for_pieces(at, [&](int64_t start, int64_t n) {
    for_vectors(n, [&](int64_t i, auto lanes) {
      store(gate + start + i, bn.gate(bn.normalized(load(z + start + i, lanes))), lanes);
    });
  });
}

template <class A>
void conv(const PackedDims& maps, const A* pooled, const A* weight, A* z, double* partial, int64_t begin, int64_t end) {
  Convolution<A> convolve(maps);
  for_each_box(maps, begin, end, [&](const Box& at) {
    A* clip = z + at.b * maps.packed();
    convolve(maps, at, pooled, weight, clip);
    A sum = 0;
    for_pieces(at, [&](int64_t start, int64_t size) {
      sum += sum_over<A>(size, [&](int64_t i, auto n) { return load(clip + start + i, n); });
    });
    const A mean = sum / static_cast<A>(at.size());
    Vec<A> deviations{};  // of which the sum tells how far the rounded mean is off
    A squares = 0;
    for_pieces(at, [&](int64_t start, int64_t size) {
      squares += sum_over<A>(size, [&](int64_t i, auto n) {
        const Vec<A> deviation = keep<A>(load(clip + start + i, n) - mean, n);
        deviations += deviation;
        return deviation * deviation;
      });
    });
    const double count = static_cast<double>(at.size()), off = sum_lanes<A>(deviations) / count;
    double* moments = partial + at.index * kMomentPartials;
    moments[0] = count, moments[1] = mean + off, moments[2] = squares - off * off * count;
  });
}

template <class A>
void conv_activate(const PackedDims& maps, const A* pooled, const A* weight, const A* norm, A* z, A* gate,
                   int64_t begin, int64_t end) {
  Convolution<A> convolve(maps);
  for_each_box(maps, begin, end, [&](const Box& at) {
    const int64_t clip = at.b * maps.packed();
    convolve(maps, at, pooled, weight, z + clip);
    activate_box(Norm<A>(norm + at.map * 4), at, z + clip, gate + clip);
  });
}

template <class A>
void activate(const PackedDims& maps, const A* z, const A* norm, A* gate, int64_t begin, int64_t end) {
  for_each_box(maps, begin, end, [&](const Box& at) {
    const int64_t clip = at.b * maps.packed();
    activate_box(Norm<A>(norm + at.map * 4), at, z + clip, gate + clip);
  });
}

template <class A>
void backward_reduce(const PackedDims& maps, const A* grad_gate, const A* z, const A* norm, double* partial,
                     int64_t begin, int64_t end) {
  for_each_box(maps, begin, end, [&](const Box& at) {
    const A *clip_z = z + at.b * maps.packed(), *clip_grad = grad_gate + at.b * maps.packed();
    const Norm<A> bn(norm + at.map * 4);
    Vec<A> sum{}, sum_normalized{};
    for_pieces(at, [&](int64_t start, int64_t size) {
      for_vectors(size, [&](int64_t i, auto n) {
        const Vec<A> normalized = bn.normalized(load(clip_z + start + i, n));
        const Vec<A> du = keep<A>(bn.through_gate(load(clip_grad + start + i, n), normalized), n);
        sum += du;
        sum_normalized += du * normalized;
      });
    });
    double* sums = partial + at.index * kNormPartials;
    sums[0] = sum_lanes<A>(sum), sums[1] = sum_lanes<A>(sum_normalized);
  });
}

template <class A>
void backward(const PackedDims& maps, const A* grad_gate, const A* z, const A* norm, const A* correction,
              const A* pooled, const A* weight, A* grad_pooled, double* partial, int64_t begin, int64_t end) {
  const int64_t packed = maps.packed();
  Stream<A> dz(maps), result(maps);
  Features<A> features(maps);
  for_each_box(maps, begin, end, [&](const Box& at) {
    const Norm<A> bn(norm + at.map * 4);
    const A scale = bn.weight * bn.rstd;
    const A mean_du = correction[at.map * 2], mean_du_normalized = correction[at.map * 2 + 1];
    const bool corrected = mean_du_normalized != A(0);  // else an infinite z would make a NaN of the zero
    const A *clip_z = z + at.b * packed, *clip_grad = grad_gate + at.b * packed;
    dz.fill(maps, at, (maps.B - at.b - 1) * packed, [&](int64_t i, auto n) {
      const Vec<A> normalized = bn.normalized(load_ahead(clip_z + i, at.ahead(), n));
      const Vec<A> du = bn.through_gate(load_ahead(clip_grad + i, at.ahead(), n), normalized);
      return (du - mean_du - (corrected ? normalized * mean_du_normalized : Vec<A>{})) * scale;
    });
    for (int i = 0; i < 2; ++i) {
      A mirrored[27];
      for (int k = 0; k < 27; ++k) mirrored[k] = weight[at.map * 54 + i * 27 + 26 - k];
      correlate<A>(at, {dz.begin(at)}, mirrored, result.begin(at));
      unpad(at, result.begin(at), grad_pooled + (at.b * 2 + i) * packed);
    }
    features.fill(maps, at, pooled);
    double* grad_weight = partial + at.index * kWeightPartials;
    for (int k = 0; k < 6; ++k) {
      Stream<A>& of = k < 3 ? features.maximum : features.mean;
      weight_taps(at, of.begin(at) + (k % 3 - 1) * at.slab_pitch(), dz.begin(at), grad_weight + k * 9);
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
