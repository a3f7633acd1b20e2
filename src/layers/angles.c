#include "layers/angles.h"
#include "graph/layout.h"
#include "graph/operations.h"
#include "graph/passes.h"

#include <math.h>

/* Exact every RESYNC positions, by rotation in between: a float64 rotation loses one ulp a step. A
 * few rows are all exact, as they would be one by one. */
enum { RESYNC = 32 };

static void write_row(const attn_tensor *table, int64_t row, int64_t j, double value) {
  int64_t at = row * table->shape[1] + j;
  if (table->dtype == ATTN_F64)
    ((double *)table->data)[at] = value;
  else
    ((float *)table->data)[at] = (float)value;
}

static attn_status tables_on_gpu(attn_graph *g, const double *theta, const attn_layout *layout,
                                 const attn_tensor *cosines, const attn_tensor *sines) {
  const int64_t *place = layout->position_place, *position = NULL;
  if (g->replay && !place)
    return attn_fail(ATTN_UNSUPPORTED, "angles: a replayed step has to say where its position is");
  if (g->replay && !(position = attn_pass_live(g, place, sizeof *place))) return g->status;
  return attn_gpu_check(g->gpu,
                        g->gpu->cuda->angles(cosines, sines, theta, position ? 0 : layout->position,
                                             position, attn_gpu_stream(g->gpu)));
}

attn_status attn_angle_tables(attn_graph *graph, const attn_tensor *thetas,
                              const attn_layout *layout, attn_tensor *cosines, attn_tensor *sines) {
  const int64_t first = layout->position, count = layout->length;
  int64_t width = thetas->shape[0], shape[2] = {count, width};
  const double *theta = thetas->data;
  *cosines = attn_graph_tensor(graph, graph->wide, 2, shape);
  *sines = attn_graph_tensor(graph, graph->wide, 2, shape);
  if (!cosines->data || !sines->data) return graph->status;
  if (graph->gpu) return tables_on_gpu(graph, theta, layout, cosines, sines);
  const int64_t run = count <= ATTN_FEW_ROWS ? 1 : RESYNC;
  int64_t blocks = (count + run - 1) / run;
  double *steps = attn_arena_alloc(graph->arena, 2 * (size_t)width * sizeof *steps);
  if (!steps) return ATTN_OUT_OF_MEMORY;
  for (int64_t j = 0; j < width; ++j) {
    steps[2 * j] = cos(theta[j]);
    steps[2 * j + 1] = sin(theta[j]);
  }
#pragma omp parallel for num_threads(graph->threads) schedule(static) if (count * width > 1 << 12)
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t start = block * run, end = start + run < count ? start + run : count;
    for (int64_t j = 0; j < width; ++j) {
      double angle = (double)(first + start) * theta[j];
      double c = cos(angle), s = sin(angle), step_c = steps[2 * j], step_s = steps[2 * j + 1];
      for (int64_t row = start; row < end; ++row) {
        write_row(cosines, row, j, c);
        write_row(sines, row, j, s);
        double turned = c * step_c - s * step_s;
        s = s * step_c + c * step_s;
        c = turned;
      }
    }
  }
  return ATTN_OK;
}

attn_tensor attn_angle_view(const attn_tensor *x, const attn_layout *layout, int64_t sequence,
                            int64_t batch, int64_t channel, int64_t count) {
  int64_t first = attn_layout_first(layout, sequence);
  int64_t length = attn_layout_length(layout, sequence);
  size_t size = attn_dtype_size(x->dtype);
  return (attn_tensor){
      .data = (char *)x->data + (first * x->stride[0] + channel) * (int64_t)size,
      .dtype = x->dtype,
      .device = x->device,
      .rank = 4,
      .shape = {batch, length, x->shape[1], count},
      .stride = {length * x->stride[0], x->stride[0], x->stride[1], 1},
  };
}

attn_tensor attn_angle_table_view(const attn_tensor *table, const attn_tensor *view, bool by_head) {
  attn_tensor seen = *view;
  seen.data = table->data;
  seen.dtype = table->dtype;
  seen.stride[0] = 0;
  seen.stride[1] = table->shape[1];
  seen.stride[2] = by_head ? view->shape[3] : 0;
  return seen;
}
