/* Running means with softmax weights, and their gradients, on the processor: chunks of tokens that
 * threads take, with a scan over what the chunks come to in between (passes.h).
 *
 * What the tokens so far come to is (m, u, w): the greatest score, sum exp(s - m), sum exp(s - m)
 * v; u = 0 says that there were none. Two of them join to m = max(ma, mb), u = ua e^(ma - m) + ub
 * e^(mb
 * - m), w alike (arXiv 2405.13956, equation 4). Chunks begin at fixed tokens, so that neither
 * threads nor what follows change a bit. */
#include "graph/operations.h"
#include "graph/passes.h"
#include "kernels/cuda/module.h"

#include <math.h>

enum { CHUNK = ATTN_PREFIX_CHUNK };

/* The sizes of a pass: s [batch, length, heads], v [batch, length, heads, dim]. */
typedef struct sizes {
  int64_t batch, length, heads, dim, chunks;
} sizes;

static sizes sizes_of(const attn_tensor *v) {
  return (sizes){.batch = v->shape[0],
                 .length = v->shape[1],
                 .heads = v->shape[2],
                 .dim = v->shape[3],
                 .chunks = (v->shape[1] + CHUNK - 1) / CHUNK};
}

static double get(const attn_tensor *t, int64_t i) {
  return t->dtype == ATTN_F64 ? ((const double *)t->data)[i] : (double)((const float *)t->data)[i];
}

static void put(const attn_tensor *t, int64_t i, double value) {
  if (t->dtype == ATTN_F64)
    ((double *)t->data)[i] = value;
  else
    ((float *)t->data)[i] = (float)value;
}

/* Head h of token t of sequence b, [dim]; and of contiguous [.., dim] row i. */
static attn_span head_of(const attn_tensor *x, int64_t b, int64_t t, int64_t h) {
  return attn_row(x, 1, b * x->stride[0] + t * x->stride[1] + h * x->stride[2]);
}
static attn_span row_of(const attn_tensor *x, int64_t i) {
  return attn_row(x, x->shape[x->rank - 1], i);
}

static int64_t end_of(const sizes *n, int64_t chunk) {
  int64_t end = (chunk + 1) * CHUNK;
  return end < n->length ? end : n->length;
}

/* Entry i of such sums, in the wide dtype: m [..], u [..], w [.., dim]. */
typedef struct sums {
  attn_tensor m, u, w;
} sums;

static bool make_sums(attn_graph *g, const sizes *n, sums *s) {
  int64_t shape[4] = {n->batch, n->chunks, n->heads, n->dim};
  s->m = attn_graph_tensor(g, g->wide, 3, shape);
  s->u = attn_graph_tensor(g, g->wide, 3, shape);
  s->w = attn_graph_tensor(g, g->wide, 4, shape);
  return g->status == ATTN_OK;
}

/* Entry i := it joined with (m, u, w). */
static void join(const attn_graph *g, const sums *all, int64_t i, double m, double u, attn_span w,
                 int64_t dim) {
  attn_span to = row_of(&all->w, i);
  double own = get(&all->u, i), greatest = get(&all->m, i);
  if (own == 0) {
    put(&all->m, i, m);
    put(&all->u, i, u);
    g->kernels->row_add(to, 1, w, 0, (attn_span){0}, dim);
    return;
  }
  double both = greatest > m ? greatest : m, kept = exp(greatest - both), added = exp(m - both);
  put(&all->m, i, both);
  put(&all->u, i, own * kept + u * added);
  g->kernels->row_add(to, kept, to, added, w, dim);
}

/* Forward ---------------------------------------------------------------------------------------
 */

/* What one chunk comes to by itself, for all heads. */
static void sum_chunk(const attn_graph *g, const sizes *n, const attn_tensor *s,
                      const attn_tensor *v, const sums *totals, int64_t b, int64_t chunk) {
  for (int64_t h = 0; h < n->heads; ++h) {
    int64_t i = (b * n->chunks + chunk) * n->heads + h;
    put(&totals->u, i, 0);
    for (int64_t t = chunk * CHUNK; t < end_of(n, chunk); ++t)
      join(g, totals, i, get(s, (b * n->length + t) * n->heads + h), 1, head_of(v, b, t, h),
           n->dim);
  }
}

/* starts[chunk] := what the chunks before it come to, of one head. */
static void scan_chunks(const attn_graph *g, const sizes *n, const sums *totals, const sums *starts,
                        int64_t b, int64_t h) {
  for (int64_t chunk = 1; chunk < n->chunks; ++chunk) {
    int64_t from = (b * n->chunks + chunk - 1) * n->heads + h, to = from + n->heads;
    double own = get(&starts->u, from);
    put(&starts->m, to, get(&starts->m, from));
    put(&starts->u, to, own);
    if (own != 0)
      g->kernels->row_add(row_of(&starts->w, to), 1, row_of(&starts->w, from), 0, (attn_span){0},
                          n->dim);
    join(g, starts, to, get(&totals->m, from), get(&totals->u, from), row_of(&totals->w, from),
         n->dim);
  }
}

/* The means of one chunk, whose start becomes its end. */
static void walk_chunk(const attn_graph *g, const sizes *n, const attn_prefix_tensors *x,
                       const sums *starts, int64_t b, int64_t chunk) {
  for (int64_t h = 0; h < n->heads; ++h) {
    int64_t i = (b * n->chunks + chunk) * n->heads + h;
    for (int64_t t = chunk * CHUNK; t < end_of(n, chunk); ++t) {
      int64_t at = (b * n->length + t) * n->heads + h;
      join(g, starts, i, get(x->s, at), 1, head_of(x->v, b, t, h), n->dim);
      double u = get(&starts->u, i);
      put(x->greatest, at, get(&starts->m, i));
      put(x->sum, at, u);
      g->kernels->row_add(head_of(x->o, b, t, h), 1 / u, row_of(&starts->w, i), 0, (attn_span){0},
                          n->dim);
    }
  }
}

/* Entries of the first chunks from a state, or empty. */
static void begin(const attn_graph *g, const sizes *n, const sums *starts,
                  const attn_prefix_state *state) {
  for (int64_t b = 0; b < n->batch; ++b)
    for (int64_t h = 0; h < n->heads; ++h) {
      int64_t i = b * n->chunks * n->heads + h;
      put(&starts->m, i, state ? get(&state->greatest, h) : 0);
      put(&starts->u, i, state ? get(&state->sum, h) : 0);
      if (state)
        g->kernels->row_add(row_of(&starts->w, i), 1, row_of(&state->weighted, h), 0,
                            (attn_span){0}, n->dim);
    }
}

static void end(const attn_graph *g, const sizes *n, const sums *starts,
                const attn_prefix_state *state) {
  for (int64_t h = 0; h < n->heads; ++h) {
    int64_t i = (n->chunks - 1) * n->heads + h;
    put(&state->greatest, h, get(&starts->m, i));
    put(&state->sum, h, get(&starts->u, i));
    g->kernels->row_add(row_of(&state->weighted, h), 1, row_of(&starts->w, i), 0, (attn_span){0},
                        n->dim);
  }
}

static void forward(attn_graph *g, const attn_prefix_tensors *x, const attn_prefix_state *state) {
  sizes n = sizes_of(x->v);
  sums totals, starts;
  if (!make_sums(g, &n, &starts)) return;
  begin(g, &n, &starts, state);
  int64_t pieces = n.batch * n.chunks, heads = n.batch * n.heads;
  int threads = n.length * heads * n.dim > ATTN_SERIAL_ELEMENTS ? g->threads : 1;
  if (n.chunks > 1) {
    if (!make_sums(g, &n, &totals)) return;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < pieces; ++i)
      sum_chunk(g, &n, x->s, x->v, &totals, i / n.chunks, i % n.chunks);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < heads; ++i)
      scan_chunks(g, &n, &totals, &starts, i / n.heads, i % n.heads);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < pieces; ++i) walk_chunk(g, &n, x, &starts, i / n.chunks, i % n.chunks);
  if (state) end(g, &n, &starts, state);
}

/* Backward --------------------------------------------------------------------------------------
 * With a_j = exp(s_j - m_j) / u_j and f(i, j) = exp(m_i - m_j) u_i / u_j, the share that what was
 * known at token i has at token j:
 *
 *   R_j = do_j + f(j, j+1) R_{j+1},  E_j = do_j . o_j + f(j, j+1) E_{j+1}
 *   dv_j = a_j R_j,  ds_j = a_j (R_j . v_j - E_j) */

typedef struct returns {
  attn_tensor r, e; /* of the first token of each chunk: [batch, chunks, heads, dim], [..] */
  attn_tensor work; /* R of a walk: [batch, chunks, dim] */
} returns;

static double share(const attn_prefix_tensors *x, int64_t i, int64_t j) {
  return exp(get(x->greatest, i) - get(x->greatest, j)) * get(x->sum, i) / get(x->sum, j);
}

/* R := do_t + factor R, and so E; `e` holds it. */
static void step_back(const attn_graph *g, const sizes *n, const attn_prefix_tensors *x,
                      attn_span r, double *e, double factor, int64_t b, int64_t t, int64_t h) {
  attn_span d_o = head_of(x->d_o, b, t, h);
  *e = g->kernels->row_dot(d_o, head_of(x->o, b, t, h), n->dim) + (factor != 0 ? factor * *e : 0);
  if (factor != 0)
    g->kernels->row_add(r, factor, r, 1, d_o, n->dim);
  else
    g->kernels->row_add(r, 1, d_o, 0, (attn_span){0}, n->dim);
}

/* R and E of a chunk's first token, as if nothing followed the chunk. */
static void return_chunk(const attn_graph *g, const sizes *n, const attn_prefix_tensors *x,
                         const returns *back, int64_t b, int64_t chunk) {
  for (int64_t h = 0; h < n->heads; ++h) {
    int64_t i = (b * n->chunks + chunk) * n->heads + h, last = end_of(n, chunk) - 1;
    double e = 0;
    for (int64_t t = last; t >= chunk * CHUNK; --t) {
      int64_t at = (b * n->length + t) * n->heads + h;
      double factor = t < last ? share(x, at, at + n->heads) : 0;
      step_back(g, n, x, row_of(&back->r, i), &e, factor, b, t, h);
    }
    put(&back->e, i, e);
  }
}

/* The same with what follows. */
static void scan_returns(const attn_graph *g, const sizes *n, const attn_prefix_tensors *x,
                         const returns *back, int64_t b, int64_t h) {
  for (int64_t chunk = n->chunks - 2; chunk >= 0; --chunk) {
    int64_t i = (b * n->chunks + chunk) * n->heads + h, next = i + n->heads;
    int64_t at = (b * n->length + chunk * CHUNK) * n->heads + h;
    double factor = share(x, at, at + CHUNK * n->heads);
    attn_span r = row_of(&back->r, i);
    put(&back->e, i, get(&back->e, i) + factor * get(&back->e, next));
    g->kernels->row_add(r, 1, r, factor, row_of(&back->r, next), n->dim);
  }
}

static void walk_back(const attn_graph *g, const sizes *n, const attn_prefix_tensors *x,
                      const returns *back, int64_t b, int64_t chunk) {
  attn_span r = row_of(&back->work, b * n->chunks + chunk);
  for (int64_t h = 0; h < n->heads; ++h) {
    int64_t next = (b * n->chunks + chunk + 1) * n->heads + h, end = end_of(n, chunk);
    double e = 0;
    if (end < n->length) {
      e = get(&back->e, next);
      g->kernels->row_add(r, 1, row_of(&back->r, next), 0, (attn_span){0}, n->dim);
    }
    for (int64_t t = end - 1; t >= chunk * CHUNK; --t) {
      int64_t at = (b * n->length + t) * n->heads + h;
      double factor = t + 1 < n->length ? share(x, at, at + n->heads) : 0;
      step_back(g, n, x, r, &e, factor, b, t, h);
      double a = exp(get(x->s, at) - get(x->greatest, at)) / get(x->sum, at);
      put(x->ds, at, a * (g->kernels->row_dot(r, head_of(x->v, b, t, h), n->dim) - e));
      g->kernels->row_add(head_of(x->dv, b, t, h), a, r, 0, (attn_span){0}, n->dim);
    }
  }
}

static void backward(attn_graph *g, const attn_prefix_tensors *x) {
  sizes n = sizes_of(x->v);
  int64_t shape[4] = {n.batch, n.chunks, n.heads, n.dim};
  returns back = {.r = attn_graph_tensor(g, g->wide, 4, shape),
                  .e = attn_graph_tensor(g, g->wide, 3, shape),
                  .work = attn_graph_tensor(g, g->wide, 2, (int64_t[]){n.batch * n.chunks, n.dim})};
  if (g->status != ATTN_OK) return;
  int64_t pieces = n.batch * n.chunks, heads = n.batch * n.heads;
  int threads = n.length * heads * n.dim > ATTN_SERIAL_ELEMENTS ? g->threads : 1;
  if (n.chunks > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < pieces; ++i) return_chunk(g, &n, x, &back, i / n.chunks, i % n.chunks);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < heads; ++i) scan_returns(g, &n, x, &back, i / n.heads, i % n.heads);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < pieces; ++i) walk_back(g, &n, x, &back, i / n.chunks, i % n.chunks);
}

/* The passes ------------------------------------------------------------------------------------
 */

static attn_status on_gpu(attn_graph *g, const attn_prefix_tensors *x,
                          const attn_prefix_state *state, bool back) {
  sizes n = sizes_of(x->v);
  int64_t entries = 2 * n.batch * n.chunks * n.heads * (n.dim + 2);
  attn_tensor workspace = attn_graph_tensor(g, g->wide, 1, &entries);
  if (!workspace.data) return g->status;
  const attn_cuda *cuda = g->gpu->cuda;
  if (back)
    return attn_gpu_check(g->gpu,
                          cuda->prefix_softmax_backward(x, &workspace, attn_gpu_stream(g->gpu)));
  return attn_gpu_check(g->gpu,
                        cuda->prefix_softmax(x, state, &workspace, attn_gpu_stream(g->gpu)));
}

static void run(attn_graph *g, const attn_prefix_tensors *x, const attn_prefix_state *state,
                bool back) {
  if (g->status != ATTN_OK || attn_tensor_count(x->v) == 0) return;
  attn_graph_mark mark = attn_graph_get_mark(g);
  if (g->gpu) {
    attn_status status = on_gpu(g, x, state, back);
    if (status != ATTN_OK) attn_graph_error(g, status);
  } else if (back) {
    backward(g, x);
  } else {
    forward(g, x, state);
  }
  attn_graph_release(g, mark);
}

void attn_pass_prefix_softmax(attn_graph *g, const attn_prefix_tensors *x,
                              const attn_prefix_state *state) {
  run(g, x, state, false);
}

void attn_pass_prefix_softmax_backward(attn_graph *g, const attn_prefix_tensors *x) {
  run(g, x, NULL, true);
}
