// What the CPU passes of CBAM look like from outside; see passes.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/matrix.h"
#include "passes.h"

namespace aia::cpu {

// Rows in one unit of a pass that leaves nothing for other units: of about so many elements.
constexpr int64_t kRowElements = 32768;
inline int64_t unit_rows(const Matrix& x) { return std::clamp<int64_t>(kRowElements / x.columns, 1, x.rows); }
inline int64_t row_units(const Matrix& x) { return x.B * ((x.rows + unit_rows(x) - 1) / unit_rows(x)); }

// A reduction over rows goes by tiles: so many columns at most, for which there are accumulators, and rows of about so
// many elements. Each tile of a sample leaves a part of the result, and the parts are joined in order.
constexpr int64_t kTileColumns = 4096, kTileSize = 131072;
struct Parts {
  int64_t columns, rows;        // of a tile
  int64_t of_columns, of_rows;  // tiles side by side, and one below the other

  explicit Parts(const Matrix& x) {
    constexpr int64_t kStep = 64;
    of_columns = (x.columns + kTileColumns - 1) / kTileColumns;
    columns = std::min(x.columns, ((x.columns + of_columns - 1) / of_columns + kStep - 1) / kStep * kStep);
    of_columns = (x.columns + columns - 1) / columns;
    rows = std::min(x.rows, std::max<int64_t>(1, kTileSize / columns / 4) * 4);
    of_rows = (x.rows + rows - 1) / rows;
  }
  int64_t units(const Matrix& x) const { return x.B * of_rows * of_columns; }
};

// x, y and their gradients are stored as Matrix says; all else but indices has the type in which x accumulates. The
// confounder, x - y, and its gradient may be null.
struct CbamPasses {
  static const CbamPasses base[kScalars], v3[kScalars], v4[kScalars];

  // Over the columns, of x times a gate of the columns: pooled [B, 2, rows], argmax [B, rows]. Units: row_units.
  void (*pool_columns)(const Matrix&, const void* x, const void* gate, void* pooled, void* argmax, int64_t begin,
                       int64_t end);
  // Over the rows, of x times a gate of the rows: the maximum, and the sum times share, [B, of_rows, 2, columns], and
  // the index [B, of_rows, columns]. Units: Parts.
  void (*pool_rows)(const Matrix&, const Parts&, const void* x, const void* gate, double share, void* pooled,
                    void* argmax, int64_t begin, int64_t end);
  // Units: samples.
  void (*join_pooled)(const Matrix&, const Parts&, const void* parts, const void* indices, void* pooled, void* argmax,
                      int64_t begin, int64_t end);
  // Units: row_units.
  void (*recalibrate)(const Matrix&, const void* x, const void* of_rows, const void* of_columns, void* y,
                      void* confounder, int64_t begin, int64_t end);
  // Of q = (grad_y - grad_confounder) * x: over columns the sums of q times the gate of the columns, [B, of_columns,
  // rows], and over rows those of q times the gate of the rows, [B, of_rows, columns]. Units: Parts.
  void (*recalibrate_reduce)(const Matrix&, const Parts&, const void* grad_y, const void* grad_confounder,
                             const void* x, const void* of_rows, const void* of_columns, void* over_columns,
                             void* over_rows, int64_t begin, int64_t end);
  // [B, channels]: the sum over positions of x times what the spatial features send back. Where rows are channels, the
  // units are row_units; elsewhere they are Parts, and the result is [B, of_rows, columns].
  void (*unpool_reduce)(const Matrix&, const Parts&, const void* x, const Side& spatial, void* sums, int64_t begin,
                        int64_t end);
  // Of [B, parts, n] the sums over parts. Units: samples.
  void (*join_sums)(int64_t parts, int64_t n, const void* from, void* to, int64_t begin, int64_t end);
  // Units: row_units.
  void (*unpool)(const Matrix&, const void* grad_y, const void* grad_confounder, const Side& channel,
                 const Side& spatial, void* grad_x, int64_t begin, int64_t end);
};

}  // namespace aia::cpu
