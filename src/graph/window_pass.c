/* Windows of exact attention beside a linear part, on the processor (kernels/window.h has the
 * formulas, kernels/cuda/window.cu the same for a GPU). */
#include "graph/operations.h"
#include "graph/passes.h"
#include "kernels/cuda/module.h"

#include <math.h>
#include <string.h>

/* Of [rows, heads], or of [rows] with h = 0. */
static double get(const attn_tensor *t, int64_t r, int64_t h) {
  int64_t i = r * t->stride[0] + h * t->stride[1];
  return t->dtype == ATTN_F64 ? ((const double *)t->data)[i] : (double)((const float *)t->data)[i];
}

static void put(const attn_tensor *t, int64_t r, int64_t h, double value) {
  int64_t i = r * t->stride[0] + h * t->stride[1];
  if (t->dtype == ATTN_F64)
    ((double *)t->data)[i] = value;
  else
    ((float *)t->data)[i] = (float)value;
}

static attn_span head_of(const attn_tensor *x, int64_t r, int64_t h) {
  return attn_row(x, 1, r * x->stride[0] + h * x->stride[1]);
}

/* Runs `call`, a function of the module, when the graph is on a GPU; and returns. */
#define ON_GPU(g, call)                                                                            \
  do {                                                                                             \
    if ((g)->status != ATTN_OK) return;                                                            \
    if (!(g)->gpu) break;                                                                          \
    attn_status gpu_status = attn_gpu_check((g)->gpu, (g)->gpu->cuda->call);                       \
    if (gpu_status != ATTN_OK) attn_graph_error((g), gpu_status);                                  \
    return;                                                                                        \
  } while (0)

static int threads_for(const attn_graph *g, const attn_tensor *x) {
  return attn_tensor_count(x) > ATTN_SERIAL_ELEMENTS ? g->threads : 1;
}

/* The greatest score ----------------------------------------------------------------------------
 */

static void find_greatest(const attn_graph *g, const attn_window_ranges *ranges,
                          const attn_greatest_tensors *x, int64_t r, int64_t h) {
  int64_t heads = x->q->shape[1], key = h * x->k->shape[1] / heads;
  attn_span q = head_of(x->q, r, h);
  double greatest = -INFINITY;
  int32_t place = ranges->first[r];
  for (int32_t j = ranges->first[r]; j < ranges->end[r]; ++j) {
    double score = x->scale * g->kernels->row_dot(q, head_of(x->k, j, key), x->q->shape[2]);
    if (!(score > greatest)) continue;
    greatest = score;
    place = j;
  }
  put(x->greatest, r, h, greatest);
  ((int32_t *)x->place->data)[r * heads + h] = place;
}

/* Queries in their order, so that the sum's order is fixed. */
static void collect(const attn_graph *g, const attn_window_ranges *ranges,
                    const attn_greatest_tensors *x, int64_t j, int64_t key) {
  int64_t heads = x->q->shape[1], group = heads / x->k->shape[1], dim = x->q->shape[2];
  const int32_t *place = x->place->data;
  attn_span to = head_of(x->dk, j, key);
  memset(to.data, 0, (size_t)dim * attn_dtype_size(to.dtype));
  for (int64_t r = ranges->from[j]; r < ranges->until[j]; ++r)
    for (int64_t h = key * group; h < (key + 1) * group; ++h)
      if (place[r * heads + h] == j)
        g->kernels->row_add(to, 1, to, x->scale * get(x->dg, r, h), head_of(x->q, r, h), dim);
}

void attn_pass_greatest(attn_graph *g, const attn_window_ranges *ranges,
                        const attn_greatest_tensors *x) {
  ON_GPU(g, window_greatest(ranges, x, attn_gpu_stream(g->gpu)));
#pragma omp parallel for num_threads(threads_for(g, x->q)) schedule(static)
  for (int64_t r = 0; r < x->q->shape[0]; ++r)
    for (int64_t h = 0; h < x->q->shape[1]; ++h) find_greatest(g, ranges, x, r, h);
}

void attn_pass_greatest_backward(attn_graph *g, const attn_window_ranges *ranges,
                                 const attn_greatest_tensors *x) {
  ON_GPU(g, window_greatest_backward(ranges, x, attn_gpu_stream(g->gpu)));
  int64_t heads = x->q->shape[1], kv_heads = x->k->shape[1], dim = x->q->shape[2];
  const int32_t *place = x->place->data;
#pragma omp parallel for num_threads(threads_for(g, x->q)) schedule(static)
  for (int64_t r = 0; r < x->q->shape[0]; ++r)
    for (int64_t h = 0; h < heads; ++h)
      g->kernels->row_add(head_of(x->dq, r, h), x->scale * get(x->dg, r, h),
                          head_of(x->k, place[r * heads + h], h * kv_heads / heads), 0,
                          (attn_span){0}, dim);
#pragma omp parallel for num_threads(threads_for(g, x->q)) schedule(static)
  for (int64_t j = 0; j < x->k->shape[0]; ++j)
    for (int64_t key = 0; key < kv_heads; ++key) collect(g, ranges, x, j, key);
}

/* Both parts under one normaliser ---------------------------------------------------------------
 */

/* The window's share of the weights, and 1 / (e + d): by the logarithm, since e may be beyond all
 * numbers. */
static void weigh(const attn_graph *g, const attn_join_tensors *x, int64_t r, int64_t h,
                  double *share, double *factor) {
  attn_span linear = head_of(x->linear, r, h);
  double one = 1;
  int64_t dim = x->window->shape[2];
  linear.data = (char *)linear.data + (size_t)dim * attn_dtype_size(linear.dtype);
  double d = g->kernels->row_dot(linear, (attn_span){&one, ATTN_F64}, 1);
  *share = 1;
  *factor = 0;
  if (!(d > 0)) return;
  double odds = get(x->factor, h, 0) + get(x->lse, r, h) - get(x->greatest, r, h) - log(d);
  *share = 1 / (1 + exp(-odds));
  *factor = 1 / (1 + exp(odds)) / d;
}

static void join(const attn_graph *g, const attn_join_tensors *x, int64_t r, int64_t h) {
  double share, factor;
  weigh(g, x, r, h, &share, &factor);
  g->kernels->row_add(head_of(x->y, r, h), share, head_of(x->window, r, h), factor,
                      head_of(x->linear, r, h), x->window->shape[2]);
}

/* With a the window's share, f = 1 / (e + d) and y = a window + f (sum w v):
 *   d window = a dy,  d (sum w v) = f dy,  d d = -f dy . y,  d log e = a dy . (window - y) */
static void join_backward(const attn_graph *g, const attn_join_tensors *x, int64_t r, int64_t h) {
  int64_t dim = x->window->shape[2], width = x->linear->shape[2];
  double share, factor, rest;
  weigh(g, x, r, h, &share, &factor);
  attn_span dy = head_of(x->dy, r, h), d_linear = head_of(x->d_linear, r, h);
  double window = g->kernels->row_dot(dy, head_of(x->window, r, h), dim);
  double linear = factor * g->kernels->row_dot(dy, head_of(x->linear, r, h), dim);
  g->kernels->row_add(head_of(x->d_window, r, h), share, dy, 0, (attn_span){0}, dim);
  g->kernels->row_add(d_linear, factor, dy, 0, (attn_span){0}, dim);
  for (int64_t c = dim; c < width; ++c) {
    attn_span to = d_linear;
    to.data = (char *)to.data + (size_t)c * attn_dtype_size(to.dtype);
    rest = c == dim ? -factor * (share * window + linear) : 0;
    g->kernels->row_add(to, 1, (attn_span){&rest, ATTN_F64}, 0, (attn_span){0}, 1);
  }
  put(x->d_log, r, h, share * (window - share * window - linear));
}

void attn_pass_join(attn_graph *g, const attn_join_tensors *x) {
  ON_GPU(g, window_join(x, attn_gpu_stream(g->gpu)));
#pragma omp parallel for num_threads(threads_for(g, x->window)) schedule(static)
  for (int64_t r = 0; r < x->window->shape[0]; ++r)
    for (int64_t h = 0; h < x->window->shape[1]; ++h) join(g, x, r, h);
}

void attn_pass_join_backward(attn_graph *g, const attn_join_tensors *x) {
  ON_GPU(g, window_join_backward(x, attn_gpu_stream(g->gpu)));
#pragma omp parallel for num_threads(threads_for(g, x->window)) schedule(static)
  for (int64_t r = 0; r < x->window->shape[0]; ++r)
    for (int64_t h = 0; h < x->window->shape[1]; ++h) join_backward(g, x, r, h);
}
