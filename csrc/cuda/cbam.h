// What the CUDA passes of CBAM look like from outside; see passes.h. x, y and their gradients are stored as Matrix
// says; all else but indices has the type in which x accumulates. The confounder, x - y, and its gradient may be null.
#pragma once

#include "../common/matrix.h"
#include "split.h"

namespace aia::cuda {

// How the rows are split in the reductions over them. A reduction leaves the results of its chunks, where there are
// several, in a workspace, and a second launch joins them; so long as there is only one, it is not used.
Split cbam_split(const Matrix&);

// Of x times a gate of the axis that is pooled: over the columns of each row, pooled [B, 2, rows] and argmax
// [B, rows]; over the rows of each column, [B, 2, columns] and [B, columns], with [B, chunks, 2, columns] and
// [B, chunks, columns] for a workspace.
int cbam_pool_columns(const Matrix&, const void* x, const void* gate, void* pooled, int32_t* argmax, void* stream);
int cbam_pool_rows(const Matrix&, const void* x, const void* gate, void* partial, int32_t* indices, void* pooled,
                   int32_t* argmax, void* stream);
int cbam_recalibrate(const Matrix&, const void* x, const void* of_rows, const void* of_columns, void* y,
                     void* confounder, void* stream);

// What cbam_recalibrate_reduce reads.
struct CbamGradients {
  const void *grad_y, *grad_confounder, *x, *of_rows, *of_columns;
};
// Tiles of columns, each of which leaves sums over its own.
int cbam_reduce_tiles(const Matrix&, const CbamGradients&);
// Of q = (grad_y - grad_confounder) * x the sums over columns of q times the gate of the columns [B, rows], with
// [B, tiles, rows] for a workspace, and over rows of q times the gate of the rows [B, columns], with
// [B, chunks, columns].
int cbam_recalibrate_reduce(const Matrix&, const CbamGradients&, void* row_parts, void* over_columns,
                            void* column_parts, void* over_rows, void* stream);
// [B, channels]: the sum over positions of x times what the spatial features send back. Where rows are positions,
// [B, chunks, columns] is the workspace.
int cbam_unpool_reduce(const Matrix&, const void* x, const Side& spatial, void* partial, void* sums, void* stream);
int cbam_unpool(const Matrix&, const void* grad_y, const void* grad_confounder, const Side& of_rows,
                const Side& of_columns, void* grad_x, void* stream);

}  // namespace aia::cuda
