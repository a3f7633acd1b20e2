/* Leaky integrate-and-fire neurons, and their surrogate gradients, on the processor: threads take
 * some channels of a sequence and walk its tokens (kernels/spikes.h). */
#include "graph/operations.h"
#include "graph/passes.h"
#include "kernels/cuda/module.h"

#include <math.h>
#include <string.h>

enum { CHANNELS = 64 }; /* that are walked together */

/* Token t of sequence b, channels from `first` on. */
static attn_span token(const attn_tensor *x, int64_t b, int64_t t, int64_t first) {
  return attn_row(x, 1, b * x->stride[0] + t * x->stride[1] + first);
}

/* The steps of some channels, once for each dtype. */
#define DEFINE_STEPS(real, suffix)                                                                 \
  static void step_##suffix(real *v, const real *x, real *h, real *s, int64_t n, double tau,       \
                            double threshold) {                                                    \
    const real rate = (real)(1 / tau), least = (real)threshold;                                    \
    for (int64_t c = 0; c < n; ++c) {                                                              \
      h[c] = v[c] + (x[c] - v[c]) * rate;                                                          \
      s[c] = h[c] >= least ? 1 : 0;                                                                \
      v[c] = h[c] * (1 - s[c]);                                                                    \
    }                                                                                              \
  }                                                                                                \
  static void step_back_##suffix(real *dv, const real *h, const real *ds, real *dx, int64_t n,     \
                                 double tau, double threshold) {                                   \
    const real rate = (real)(1 / tau), least = (real)threshold;                                    \
    const real slope = (real)ATTN_SURROGATE_SLOPE;                                                 \
    for (int64_t c = 0; c < n; ++c) {                                                              \
      real sigmoid = 1 / (1 + (real)exp(-(double)(slope * (h[c] - least))));                       \
      real kept = h[c] >= least ? 0 : dv[c];                                                       \
      real dh = ds[c] * slope * sigmoid * (1 - sigmoid) + kept;                                    \
      dx[c] = dh * rate;                                                                           \
      dv[c] = dh * (1 - rate);                                                                     \
    }                                                                                              \
  }

DEFINE_STEPS(float, f32)
DEFINE_STEPS(double, f64)

/* Room for CHANNELS numbers of either dtype. */
typedef union lane {
  float f32[CHANNELS];
  double f64[CHANNELS];
} lane;

static void copy(const attn_graph *g, attn_span to, attn_span from, int64_t n) {
  g->kernels->row_add(to, 1, from, 0, (attn_span){0}, n);
}

static void walk(const attn_graph *g, const attn_lif_tensors *x, int64_t b, int64_t first,
                 int64_t n) {
  attn_dtype dtype = x->x->dtype;
  lane v = {{0}}, h, s;
  attn_span v_span = {&v, dtype}, h_span = {&h, dtype}, s_span = {&s, dtype};
  if (x->state) copy(g, v_span, attn_row(x->state, 1, first), n);
  for (int64_t t = 0; t < x->x->shape[1]; ++t) {
    const void *in = token(x->x, b, t, first).data;
    if (dtype == ATTN_F64)
      step_f64(v.f64, in, h.f64, s.f64, n, x->tau, x->threshold);
    else
      step_f32(v.f32, in, h.f32, s.f32, n, x->tau, x->threshold);
    copy(g, token(x->spikes, b, t, first), s_span, n);
    if (x->potential) copy(g, token(x->potential, b, t, first), h_span, n);
  }
  if (x->state) copy(g, attn_row(x->state, 1, first), v_span, n);
}

static void walk_back(const attn_graph *g, const attn_lif_tensors *x, int64_t b, int64_t first,
                      int64_t n) {
  attn_dtype dtype = x->dx->dtype;
  lane dv = {{0}}, ds;
  if (dtype == ATTN_F64) memset(&dv, 0, sizeof dv);
  for (int64_t t = x->dx->shape[1] - 1; t >= 0; --t) {
    const void *h = token(x->potential, b, t, first).data;
    void *dx = token(x->dx, b, t, first).data;
    copy(g, (attn_span){&ds, dtype}, token(x->d_spikes, b, t, first), n);
    if (dtype == ATTN_F64)
      step_back_f64(dv.f64, h, ds.f64, dx, n, x->tau, x->threshold);
    else
      step_back_f32(dv.f32, h, ds.f32, dx, n, x->tau, x->threshold);
  }
}

static void run(attn_graph *g, const attn_lif_tensors *x, bool back) {
  const attn_tensor *all = back ? x->dx : x->x;
  if (g->status != ATTN_OK || attn_tensor_count(all) == 0) return;
  if (g->gpu) {
    attn_cuda_stream stream = attn_gpu_stream(g->gpu);
    attn_status status = attn_gpu_check(g->gpu, back ? g->gpu->cuda->lif_backward(x, stream)
                                                     : g->gpu->cuda->lif(x, stream));
    if (status != ATTN_OK) attn_graph_error(g, status);
    return;
  }
  int64_t width = all->shape[2], blocks = (width + CHANNELS - 1) / CHANNELS;
  int threads = attn_tensor_count(all) > ATTN_SERIAL_ELEMENTS ? g->threads : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < all->shape[0] * blocks; ++i) {
    int64_t first = i % blocks * CHANNELS, n = width - first < CHANNELS ? width - first : CHANNELS;
    if (back)
      walk_back(g, x, i / blocks, first, n);
    else
      walk(g, x, i / blocks, first, n);
  }
}

void attn_pass_lif(attn_graph *graph, const attn_lif_tensors *tensors) {
  run(graph, tensors, false);
}

void attn_pass_lif_backward(attn_graph *graph, const attn_lif_tensors *tensors) {
  run(graph, tensors, true);
}

void attn_pass_inverse_root(attn_graph *g, const attn_tensor *y, const attn_tensor *x,
                            double epsilon) {
  if (g->status != ATTN_OK) return;
  if (g->gpu) {
    attn_status status =
        attn_gpu_check(g->gpu, g->gpu->cuda->inverse_root(y, x, epsilon, attn_gpu_stream(g->gpu)));
    if (status != ATTN_OK) attn_graph_error(g, status);
    return;
  }
  copy(g, attn_row(y, 1, 0), attn_row(x, 1, 0), y->shape[0]);
  for (int64_t c = 0; c < y->shape[0]; ++c)
    if (y->dtype == ATTN_F64)
      ((double *)y->data)[c] = 1 / sqrt(((double *)y->data)[c] + epsilon);
    else
      ((float *)y->data)[c] = (float)(1 / sqrt((double)((float *)y->data)[c] + epsilon));
}
