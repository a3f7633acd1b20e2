/* Causal depthwise convolution over a few tokens, used by KDA and Gated DeltaNet on q, k and v.
 *
 *   y_t[c] = sum_{j < W} w[c][W-1-j] x_{t-j}[c]
 *   dx_t[c] = sum_{j < W} w[c][W-1-j] dy_{t+j}[c],  dw[c][W-1-j] = sum_t dy_t[c] x_{t-j}[c] */
#include "graph/operations.h"
#include "layers/layers.h"

#include <string.h>

enum { MAX_TAPS = 16 };

typedef struct convolution_node {
  attn_node node;
  attn_var *x, *w;
  attn_tensor taps; /* [W, channels]: taps[j] multiplies x_{t-j} */
  attn_tensor tail; /* as it was before this pass; data is NULL when there is none */
  attn_layout layout;
} convolution_node;

/* w [channels, W] with the taps reversed and the channels innermost. */
static attn_tensor make_taps(attn_graph *g, const attn_tensor *w) {
  int64_t channels = w->shape[0], width = w->shape[1];
  attn_tensor taps = attn_graph_tensor(g, g->wide, 2, (int64_t[]){width, channels});
  for (int64_t j = 0; taps.data && j < width; ++j) {
    attn_tensor column, row;
    attn_status status = attn_tensor_select(w, 1, width - 1 - j, &column);
    if (status == ATTN_OK) status = attn_tensor_select(&taps, 0, j, &row);
    if (status == ATTN_OK) status = attn_tensor_copy(&column, &row);
    if (status != ATTN_OK) attn_graph_error(g, status);
  }
  return taps;
}

/* The input t rows after the start of a sequence; t < 0 reaches into the tail. */
static attn_span input_row(const attn_tensor *x, const attn_tensor *tail, int64_t first,
                           int64_t t) {
  if (t >= 0) return attn_row(x, x->stride[0], first + t);
  return attn_row(tail, tail->shape[1], tail->shape[0] + t);
}

static attn_status backward_x(attn_graph *g, convolution_node *self, const attn_tensor *dy) {
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (!dx.data) return g->status;
  int64_t width = self->taps.shape[0], channels = self->taps.shape[1];
  for (int64_t b = 0; b < self->layout.batch; ++b) {
    int64_t first = attn_layout_first(&self->layout, b);
    int64_t length = attn_layout_length(&self->layout, b);
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (length * channels > ATTN_SERIAL_ELEMENTS)
    for (int64_t t = 0; t < length; ++t) {
      attn_span upstream[MAX_TAPS], taps[MAX_TAPS];
      int count = 0;
      for (int64_t j = 0; j < width && t + j < length; ++j, ++count) {
        upstream[count] = attn_row(dy, dy->stride[0], first + t + j);
        taps[count] = attn_row(&self->taps, channels, j);
      }
      g->kernels->row_multiply_sum(attn_row(&dx, dx.stride[0], first + t), accumulate, upstream,
                                   taps, count, channels);
    }
  }
  return ATTN_OK;
}

/* Threads share the taps; tokens are summed in order. */
static attn_status backward_w(attn_graph *g, convolution_node *self, const attn_tensor *dy) {
  attn_tensor dw = attn_graph_tensor_like(g, g->wide, &self->w->value);
  attn_tensor sums = attn_graph_tensor_like(g, g->wide, &self->taps);
  if (!dw.data || !sums.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&sums, 0));
  const attn_tensor *x = &self->x->value, *tail = self->tail.data ? &self->tail : NULL;
  int64_t width = sums.shape[0], channels = sums.shape[1];
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (attn_tensor_count(x) > ATTN_SERIAL_ELEMENTS)
  for (int64_t j = 0; j < width; ++j)
    for (int64_t b = 0; b < self->layout.batch; ++b) {
      int64_t first = attn_layout_first(&self->layout, b);
      int64_t length = attn_layout_length(&self->layout, b);
      for (int64_t t = tail ? 0 : j; t < length; t += MAX_TAPS) {
        attn_span upstream[MAX_TAPS], from[MAX_TAPS];
        int count = 0;
        for (; count < MAX_TAPS && t + count < length; ++count) {
          upstream[count] = attn_row(dy, dy->stride[0], first + t + count);
          from[count] = input_row(x, tail, first, t + count - j);
        }
        g->kernels->row_multiply_sum(attn_row(&sums, channels, j), true, upstream, from, count,
                                     channels);
      }
    }
  for (int64_t j = 0; j < width; ++j) {
    attn_tensor column, row;
    ATTN_TRY(attn_tensor_select(&dw, 1, width - 1 - j, &column));
    ATTN_TRY(attn_tensor_select(&sums, 0, j, &row));
    ATTN_TRY(attn_tensor_copy(&row, &column));
  }
  attn_gradient_add(g, self->w, &dw);
  return g->status;
}

static attn_status convolution_backward(attn_graph *g, attn_node *node) {
  convolution_node *self = (convolution_node *)node;
  if (self->x->needs_gradient) ATTN_TRY(backward_x(g, self, &node->output->gradient));
  if (self->w->needs_gradient) ATTN_TRY(backward_w(g, self, &node->output->gradient));
  return g->status;
}

/* Moves the tail on: the last W - 1 rows of (tail, x). */
static void move_tail(const attn_tensor *tail, const attn_tensor *x) {
  int64_t kept = tail->shape[0], rows = x->shape[0], channels = tail->shape[1];
  size_t size = (size_t)channels * attn_dtype_size(tail->dtype);
  char *memory = tail->data;
  int64_t old = kept > rows ? kept - rows : 0; /* rows of the old tail that stay */
  memmove(memory, memory + (size_t)(kept - old) * size, (size_t)old * size);
  for (int64_t i = old; i < kept; ++i)
    memcpy(memory + (size_t)i * size, attn_row(x, x->stride[0], rows - kept + i).data, size);
}

attn_var *attn_layer_short_convolution(attn_graph *graph, attn_var *x, attn_var *w,
                                       const attn_layout *layout, const attn_tensor *tail) {
  if (!x || !w) return NULL;
  char text[128];
  const attn_tensor *in = &x->value;
  int64_t width = w->value.rank == 2 ? w->value.shape[1] : 0;
  if (in->rank != 2 || in->shape[0] != layout->rows || in->stride[1] != 1 || width < 1 ||
      width > MAX_TAPS || w->value.shape[0] != in->shape[1])
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "short_convolution: x is %s, w %s, expected [%lld, channels] and "
                           "[channels, 1 to 16]",
                           attn_shape_text(in, text), attn_shape_text(&w->value, (char[128]){0}),
                           (long long)layout->rows);
  int64_t channels = in->shape[1];
  if (tail &&
      (layout->batch != 1 || tail->rank != 2 || tail->shape[0] != width - 1 ||
       tail->shape[1] != channels || tail->dtype != in->dtype || !attn_tensor_is_contiguous(tail)))
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "short_convolution: the tail is not a contiguous [%lld, %lld] of one "
                           "sequence",
                           (long long)width - 1, (long long)channels);
  attn_tensor taps = make_taps(graph, &w->value);
  attn_tensor value = attn_graph_tensor_like(graph, in->dtype, in);
  if (!taps.data || !value.data || graph->status != ATTN_OK) return NULL;
  for (int64_t b = 0; b < layout->batch; ++b) {
    int64_t first = attn_layout_first(layout, b), length = attn_layout_length(layout, b);
#pragma omp parallel for num_threads(graph->threads)                                               \
    schedule(static) if (length * channels > ATTN_SERIAL_ELEMENTS)
    for (int64_t t = 0; t < length; ++t) {
      attn_span from[MAX_TAPS], by[MAX_TAPS];
      int count = 0;
      for (int64_t j = 0; j < width && (t - j >= 0 || tail); ++j, ++count) {
        from[count] = input_row(in, tail, first, t - j);
        by[count] = attn_row(&taps, channels, j);
      }
      graph->kernels->row_multiply_sum(attn_row(&value, channels, first + t), false, from, by,
                                       count, channels);
    }
  }
  attn_var *y = attn_graph_result(graph, value, 2, (attn_var *[]){x, w});
  attn_tensor old_tail = {0};
  if (tail && y && y->needs_gradient) {
    old_tail = attn_graph_tensor_like(graph, tail->dtype, tail);
    if (!old_tail.data) return NULL;
    attn_add_tensor(graph, &old_tail, tail, 1, false);
  }
  if (tail) move_tail(tail, in);
  convolution_node *node = attn_graph_record(graph, sizeof *node, y, convolution_backward);
  if (node) {
    node->x = x;
    node->w = w;
    node->taps = taps;
    node->tail = old_tail;
    node->layout = *layout;
  }
  return y;
}
