/* Causal depthwise convolution over a few tokens, used by KDA and Gated DeltaNet on q, k and v
 * and by LAWCAT on q and k.
 *
 *   y_t[c] = sum_{j < W} w[c][W-1-j] x_{t-j}[c]
 *   dx_t[c] = sum_{j < W} w[c][W-1-j] dy_{t+j}[c],  dw[c][W-1-j] = sum_t dy_t[c] x_{t-j}[c] */
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

enum { MAX_TAPS = 16 };

typedef struct convolution_node {
  attn_node node;
  attn_var *x, *w;
  attn_tensor taps; /* [W, channels]: taps[j] multiplies x_{t-j}; the processor's */
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

/* The rows [start, start + count) of `batch` sequences from `sequence` on: [batch, count,
 * channels].
 */
static attn_tensor rows_of(const attn_tensor *x, const attn_layout *layout, int64_t sequence,
                           int64_t batch, int64_t start, int64_t count) {
  int64_t first = attn_layout_first(layout, sequence) + start;
  return (attn_tensor){
      .data = attn_row(x, x->stride[0], first).data,
      .dtype = x->dtype,
      .device = x->device,
      .rank = 3,
      .shape = {batch, count, x->shape[1]},
      .stride = {attn_layout_length(layout, sequence) * x->stride[0], x->stride[0], 1},
  };
}

/* Rows [start, start + count) of the tail, of the one sequence that has one. */
static attn_tensor tail_rows(const attn_tensor *tail, int64_t start, int64_t count) {
  attn_layout whole = attn_layout_equal(1, tail->shape[0]);
  return rows_of(tail, &whole, 0, 1, start, count);
}

/* Row j of the taps for all the rows of `like`. */
static attn_tensor tap(const attn_tensor *taps, int64_t j, const attn_tensor *like) {
  attn_tensor row = *like;
  row.data = attn_row(taps, taps->shape[1], j).data;
  row.dtype = taps->dtype;
  row.stride[0] = row.stride[1] = 0;
  return row;
}

/* All sequences in one go where they are equally long. */
static int64_t batch_of(const attn_layout *layout) {
  return layout->offsets ? 1 : layout->batch;
}

/* y[t] for t in [start, start + count), all of which have the same terms: inputs of the
 * sequence, and before it those of the tail, if there is one (count is 1 there). */
static void convolve(attn_graph *g, const attn_tensor *y, const attn_tensor *x,
                     const attn_tensor *taps, const attn_tensor *tail, const attn_layout *layout,
                     int64_t sequence, int64_t batch, int64_t start, int64_t count) {
  attn_tensor from[MAX_TAPS], by[MAX_TAPS], to = rows_of(y, layout, sequence, batch, start, count);
  int64_t width = taps->shape[0];
  int terms = 0;
  for (int64_t j = 0; j < width && (start - j >= 0 || tail); ++j, ++terms) {
    from[terms] = start - j >= 0 ? rows_of(x, layout, sequence, batch, start - j, count)
                                 : tail_rows(tail, width - 1 + start - j, count);
    by[terms] = tap(taps, j, &to);
  }
  attn_pass_multiply_sum(g, &to, false, terms, from, by);
}

static void convolve_all(attn_graph *g, const attn_tensor *y, const attn_tensor *x,
                         const attn_tensor *taps, const attn_tensor *tail,
                         const attn_layout *layout) {
  int64_t step = batch_of(layout);
  for (int64_t b = 0; b < layout->batch; b += step) {
    int64_t length = attn_layout_length(layout, b), short_rows = taps->shape[0] - 1;
    if (short_rows > length) short_rows = length;
    for (int64_t t = 0; t < short_rows; ++t) convolve(g, y, x, taps, tail, layout, b, step, t, 1);
    if (length > short_rows)
      convolve(g, y, x, taps, tail, layout, b, step, short_rows, length - short_rows);
  }
}

/* The same for all rows in one pass on a GPU, which also moves the tail on; or, in reverse, the
 * gradient of x from that of y. */
static void convolve_on_gpu(attn_graph *g, const attn_tensor *y, bool accumulate,
                            const attn_tensor *x, const attn_tensor *w, const attn_tensor *tail,
                            const attn_layout *layout, bool reverse) {
  int64_t step = batch_of(layout);
  for (int64_t b = 0; b < layout->batch; b += step) {
    int64_t length = attn_layout_length(layout, b);
    attn_tensor to = rows_of(y, layout, b, step, 0, length);
    attn_tensor from = rows_of(x, layout, b, step, 0, length);
    if (length > 0) attn_pass_convolve(g, &to, accumulate, &from, w, tail, reverse);
  }
}

static attn_status backward_x(attn_graph *g, convolution_node *self, const attn_tensor *dy) {
  const attn_layout *layout = &self->layout;
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (!dx.data) return g->status;
  if (g->gpu) {
    convolve_on_gpu(g, &dx, accumulate, dy, &self->w->value, NULL, layout, true);
    return g->status;
  }
  int64_t width = self->taps.shape[0], step = batch_of(layout);
  for (int64_t b = 0; b < layout->batch; b += step) {
    int64_t length = attn_layout_length(layout, b);
    int64_t full = length >= width ? length - width + 1 : 0; /* rows with all terms, at once */
    for (int64_t t = 0; t < length; t += t < full ? full : 1) {
      attn_tensor upstream[MAX_TAPS], by[MAX_TAPS];
      attn_tensor to = rows_of(&dx, layout, b, step, t, t < full ? full : 1);
      int terms = 0;
      for (int64_t j = 0; j < width && t + j < length; ++j, ++terms) {
        upstream[terms] = rows_of(dy, layout, b, step, t + j, to.shape[1]);
        by[terms] = tap(&self->taps, j, &to);
      }
      attn_pass_multiply_sum(g, &to, accumulate, terms, upstream, by);
    }
  }
  return g->status;
}

/* sum (+)= sum over the rows of dy (.) x */
static void add_columns(attn_graph *g, const attn_tensor *sum, const attn_tensor *part,
                        const attn_tensor *dy, const attn_tensor *x) {
  attn_pass_column_dot(g, part, dy, x);
  attn_add_tensor(g, sum, part, 1, true);
}

static attn_status backward_w(attn_graph *g, convolution_node *self, const attn_tensor *dy) {
  attn_tensor dw = attn_graph_tensor_like(g, g->wide, &self->w->value);
  int64_t channels = dw.shape[0], width = dw.shape[1];
  attn_tensor sums = attn_graph_tensor(g, g->wide, 2, (int64_t[]){width, channels});
  const attn_tensor *x = &self->x->value, *tail = self->tail.data ? &self->tail : NULL;
  const attn_layout *layout = &self->layout;
  int64_t step = batch_of(layout);
  attn_tensor part = attn_graph_tensor(g, g->wide, 1, &channels);
  if (!dw.data || !sums.data || !part.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&sums, 0));
  for (int64_t j = 0; j < width; ++j) {
    attn_tensor column, row;
    ATTN_TRY(attn_tensor_select(&sums, 0, j, &row));
    for (int64_t b = 0; b < layout->batch; b += step) {
      int64_t length = attn_layout_length(layout, b), outside = j < length ? j : length;
      if (tail && outside > 0) {
        attn_tensor upstream = rows_of(dy, layout, b, step, 0, outside);
        attn_tensor from = tail_rows(tail, width - 1 - j, outside);
        add_columns(g, &row, &part, &upstream, &from);
      }
      if (length <= j) continue;
      attn_tensor upstream = rows_of(dy, layout, b, step, j, length - j);
      attn_tensor from = rows_of(x, layout, b, step, 0, length - j);
      add_columns(g, &row, &part, &upstream, &from);
    }
    ATTN_TRY(attn_tensor_select(&dw, 1, width - 1 - j, &column));
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

/* Moves the tail on: the last W - 1 rows of (tail, x), one by one, since they may overlap. */
static void move_tail(attn_graph *g, const attn_tensor *tail, const attn_tensor *x) {
  int64_t kept = tail->shape[0], rows = x->shape[0];
  int64_t old = kept > rows ? kept - rows : 0; /* rows of the old tail that stay */
  for (int64_t i = 0; i < kept; ++i) {
    const attn_tensor *source = i < old ? tail : x;
    attn_tensor from, to;
    attn_status status =
        attn_tensor_slice(source, 0, i < old ? i + kept - old : rows - kept + i, 1, &from);
    if (status == ATTN_OK) status = attn_tensor_slice(tail, 0, i, 1, &to);
    if (status == ATTN_OK) status = attn_tensor_copy(&from, &to);
    if (status != ATTN_OK) attn_graph_error(g, status);
  }
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
  attn_tensor value = attn_graph_tensor_like(graph, in->dtype, in), taps = {0}, old_tail = {0};
  attn_var *y = attn_graph_result(graph, value, 2, (attn_var *[]){x, w});
  if (tail && y && y->needs_gradient) {
    old_tail = attn_graph_tensor_like(graph, tail->dtype, tail);
    if (!old_tail.data) return NULL;
    attn_add_tensor(graph, &old_tail, tail, 1, false);
  }
  if (!y) return NULL;
  if (graph->gpu) {
    convolve_on_gpu(graph, &value, false, in, &w->value, tail, layout, false);
  } else {
    taps = make_taps(graph, &w->value);
    if (!taps.data || graph->status != ATTN_OK) return NULL;
    convolve_all(graph, &value, in, &taps, tail, layout);
    if (tail) move_tail(graph, tail, in);
  }
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
