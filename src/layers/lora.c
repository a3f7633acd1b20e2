/* Low-rank adaptation: LoRA (arXiv 2106.09685, section 4.1), rsLoRA (2312.03732), DoRA (2402.09353,
 * equations 5 and 11).
 *
 *   v = x W^T + s (x A^T) B^T          y = v, of DoRA y = v (.) m / n,  n_j = ||V_j||
 *   dB = s dv^T (x A^T),  dA = s (dv B)^T x,  dx = dv W + s (dv B) A,  dm_j = sum_t dy_tj v_tj /
 * n_j
 *
 * with V = W + s B A, which is never made, and n a constant to backward, so that dv = dy (.) m / n.
 * Since V_j = W_j + s B_j A, its square is
 *
 *   n_j^2 = W_j . W_j + s B_j . (A W_j + A V_j),
 *
 * and A W^T, A V^T are the layer, frozen and adapted, on the rows of A: r rows more, for W in any
 * form and on any device. With B = 0 the second term is exactly 0 and n exactly the norm that m
 * began with. */
#include "layers/lora.h"
#include "base/random.h"
#include "engines/dense/dense.h"
#include "graph/operations.h"
#include "graph/passes.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static attn_dtype master_dtype(attn_dtype compute) {
  return compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
}

/* Forward ---------------------------------------------------------------------------------------
 */

/* v = y + s (x A^T) B^T; the narrow rows are scaled, before they are rounded to the compute dtype.
 */
static attn_var *add_low_rank(attn_graph *g, attn_lora *lora, attn_var *x, attn_var *y) {
  attn_var *narrow = attn_op_linear_wide(g, x, &lora->a);
  narrow = attn_op_scale(g, narrow, lora->scale);
  return attn_op_linear_add(g, y, narrow, &lora->b);
}

/* B_j . (A W_j + A V_j) of each output, in `dots` [outputs]. */
static void cross_terms(attn_graph *g, attn_lora *lora, attn_parameter *w,
                        const attn_tensor *dots) {
  int64_t outputs = w->value.shape[0], shape[2] = {outputs, lora->rank};
  attn_var *a = attn_graph_input(g, &lora->a.value);
  attn_var *frozen = attn_op_linear_frozen(g, a, w, g->wide);
  attn_var *adapted = attn_op_add(g, frozen, add_low_rank(g, lora, a, frozen));
  attn_tensor columns, rows = attn_graph_tensor(g, g->wide, 2, shape);
  if (!adapted || !rows.data) return;
  attn_status status = attn_tensor_permute(&adapted->value, (int[]){1, 0}, &columns);
  if (status != ATTN_OK) attn_graph_error(g, status);
  attn_add_tensor(g, &rows, &columns, 1, false);
  attn_pass_row_dot(g, dots, &lora->b.value, &rows);
}

/* Numbers of the graph's device in float64, for the processor to look at; NULL after an error. */
static double *bring_home(attn_graph *g, const attn_tensor *x) {
  int64_t count = attn_tensor_count(x);
  attn_tensor home;
  double *numbers = attn_arena_alloc(g->arena, (size_t)count * sizeof *numbers);
  attn_status status = numbers ? g->status : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = attn_tensor_wrap(numbers, ATTN_F64, 1, &count, &home);
  if (status == ATTN_OK) status = attn_tensor_copy(x, &home);
  return status == ATTN_OK ? numbers : attn_graph_error(g, status);
}

/* The norms of V's rows, rounded as m is, so that both are the same number as long as V is W. */
static double *row_norms(attn_graph *g, attn_lora *lora, attn_parameter *w) {
  int64_t outputs = w->value.shape[0];
  attn_tensor dots = attn_graph_tensor(g, g->wide, 1, &outputs);
  bool recording = g->recording;
  if (!dots.data) return NULL;
  attn_graph_mark mark = attn_graph_get_mark(g);
  g->recording = false; /* n is a constant */
  cross_terms(g, lora, w, &dots);
  g->recording = recording;
  attn_graph_release(g, mark);
  double *norms = bring_home(g, &dots);
  for (int64_t j = 0; norms && j < outputs; ++j) {
    double square = lora->squares[j] + lora->scale * norms[j], norm = square > 0 ? sqrt(square) : 0;
    norms[j] = lora->magnitude.value.dtype == ATTN_F64 ? norm : (double)(float)norm;
  }
  return norms;
}

typedef struct factors_node {
  attn_node node;
  attn_var *m;
  attn_tensor inverse; /* 1 / n */
} factors_node;

static attn_status factors_backward(attn_graph *g, attn_node *node) {
  factors_node *self = (factors_node *)node;
  bool accumulate;
  attn_tensor dm = attn_gradient_of(g, self->m, &accumulate);
  if (dm.data)
    attn_pass_multiply_sum(g, &dm, accumulate, 1, &node->output->gradient, &self->inverse);
  return g->status;
}

/* m / n, 0 for a row of zeros, whose direction is none. */
static attn_var *factors(attn_graph *g, attn_lora *lora, double *norms) {
  attn_var *m = attn_graph_parameter(g, &lora->magnitude);
  double *quotients = m ? bring_home(g, &m->value) : NULL;
  if (!norms || !quotients) return NULL;
  int64_t outputs = m->value.shape[0];
  for (int64_t j = 0; j < outputs; ++j) {
    quotients[j] = norms[j] > 0 ? quotients[j] / norms[j] : 0;
    norms[j] = norms[j] > 0 ? 1 / norms[j] : 0;
  }
  attn_tensor value = attn_pass_numbers(g, g->wide, outputs, quotients);
  attn_tensor inverse = attn_pass_numbers(g, g->wide, outputs, norms);
  if (!value.data || !inverse.data) return NULL;
  attn_var *y = attn_graph_result(g, value, 1, &m);
  factors_node *node = attn_graph_record(g, sizeof *node, y, factors_backward);
  if (node) {
    node->m = m;
    node->inverse = inverse;
  }
  return y;
}

attn_var *attn_layer_lora(attn_graph *graph, attn_lora *lora, attn_parameter *w, attn_var *x,
                          attn_var *y) {
  if (!x || !y) return NULL;
  attn_var *v = add_low_rank(graph, lora, x, y);
  attn_graph_forget(graph, y);
  if (lora->kind != ATTN_LORA_DORA) return v;
  return attn_op_scale_columns(graph, v, factors(graph, lora, row_norms(graph, lora, w)), 1);
}

static attn_var *apply(attn_graph *graph, attn_parameter *w, attn_var *x, attn_var *y) {
  return attn_layer_lora(graph, (attn_lora *)(uintptr_t)w->adapter, w, x, y);
}

/* Making one ------------------------------------------------------------------------------------
 */

double attn_lora_scale(attn_lora_kind kind, int64_t rank, double alpha) {
  return alpha / (kind == ATTN_LORA_RANK_STABLE ? sqrt((double)rank) : (double)rank);
}

static attn_status check(attn_lora_kind kind, int64_t rank, double alpha, const attn_parameter *w) {
  if ((unsigned)kind > ATTN_LORA_DORA)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lora: kind is %d", (int)kind);
  if (w->value.rank != 2) return attn_fail(ATTN_INVALID_SHAPE, "lora: %s is not a matrix", w->name);
  if (attn_is_cuda(w->value.device))
    return attn_fail(ATTN_UNSUPPORTED, "lora: %s is on a GPU: adapt it before it moves there",
                     w->name);
  if (rank < 1 || rank > ATTN_LORA_MOST_RANK)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lora: the rank is %lld, expected 1 to %d",
                     (long long)rank, ATTN_LORA_MOST_RANK);
  if (alpha > 0 && isfinite(alpha)) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "lora: alpha is %g, expected above 0", alpha);
}

/* "q_proj.weight" and "lora_A.weight" to "q_proj.lora_A.weight". */
static const char *make_name(const char *weight, const char *part) {
  static const char end[] = ".weight";
  size_t length = strlen(weight), cut = sizeof end - 1;
  if (length > cut && strcmp(weight + length - cut, end) == 0) length -= cut;
  size_t size = length + strlen(part) + 2;
  char *name = attn_alloc(size);
  if (name) snprintf(name, size, "%.*s.%s", (int)length, weight, part);
  return name;
}

static attn_status make_parameter(const char *weight, const char *part, attn_dtype compute,
                                  int rank, const int64_t *shape, attn_parameter *p) {
  p->name = make_name(weight, part);
  if (!p->name) return ATTN_OUT_OF_MEMORY;
  p->decay = rank == 2;
  ATTN_TRY(attn_tensor_create(master_dtype(compute), rank, shape, &p->value));
  return rank == 2 ? attn_weight_create(shape[0], shape[1], compute, &p->weight) : ATTN_OK;
}

static void put(const attn_tensor *tensor, int64_t i, double number) {
  if (tensor->dtype == ATTN_F64)
    ((double *)tensor->data)[i] = number;
  else
    ((float *)tensor->data)[i] = (float)number;
}

static void fill_a(attn_lora *lora, uint64_t seed, uint64_t stream) {
  attn_random random = {.seed = seed, .stream = stream};
  double bound = 1 / sqrt((double)lora->a.value.shape[1]);
  int64_t count = attn_tensor_count(&lora->a.value);
  for (int64_t i = 0; i < count; ++i)
    put(&lora->a.value, i, bound * (2 * attn_random_uniform(&random) - 1));
}

/* Row j of W in float64; `numbers` has room for one in float32. */
static attn_status read_row(const attn_parameter *w, int64_t j, float *numbers, double *row) {
  int64_t inputs = w->value.shape[1];
  attn_tensor from, to;
  if (w->blocks) {
    ATTN_TRY(attn_parameter_row(w, j, numbers));
    for (int64_t i = 0; i < inputs; ++i) row[i] = numbers[i];
    return ATTN_OK;
  }
  ATTN_TRY(attn_tensor_select(&w->value, 0, j, &from));
  ATTN_TRY(attn_tensor_wrap(row, ATTN_F64, 1, &inputs, &to));
  return attn_tensor_copy(&from, &to);
}

static double dot(const double *a, const double *b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

/* m and the squares of W's rows. */
static attn_status measure_rows(attn_lora *lora, const attn_parameter *w) {
  int64_t outputs = w->value.shape[0], inputs = w->value.shape[1];
  lora->squares = attn_alloc_array((size_t)outputs, sizeof *lora->squares);
  double *row = attn_alloc_array((size_t)inputs, sizeof *row);
  float *numbers = attn_alloc_array((size_t)inputs, sizeof *numbers);
  attn_status status = lora->squares && row && numbers ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t j = 0; j < outputs && status == ATTN_OK; ++j) {
    status = read_row(w, j, numbers, row);
    lora->squares[j] = dot(row, row, inputs);
    put(&lora->magnitude.value, j, sqrt(lora->squares[j]));
  }
  attn_free(row);
  attn_free(numbers);
  return status;
}

static attn_status fill(attn_lora *lora, const attn_parameter *w, attn_dtype compute, uint64_t seed,
                        uint64_t stream) {
  const int64_t *shape = w->value.shape;
  int64_t narrow[2] = {lora->rank, shape[1]}, wide[2] = {shape[0], lora->rank};
  ATTN_TRY(make_parameter(w->name, "lora_A.weight", compute, 2, narrow, &lora->a));
  ATTN_TRY(make_parameter(w->name, "lora_B.weight", compute, 2, wide, &lora->b));
  fill_a(lora, seed, stream);
  ATTN_TRY(attn_weight_set(lora->a.weight, &lora->a.value));
  ATTN_TRY(attn_weight_set(lora->b.weight, &lora->b.value));
  if (lora->kind != ATTN_LORA_DORA) return ATTN_OK;
  ATTN_TRY(make_parameter(w->name, "lora_magnitude_vector", compute, 1, shape, &lora->magnitude));
  return measure_rows(lora, w);
}

attn_status attn_lora_create(attn_lora_kind kind, int64_t rank, double alpha,
                             const attn_parameter *w, attn_dtype compute, uint64_t seed,
                             uint64_t stream, attn_lora **lora) {
  *lora = NULL;
  ATTN_TRY(check(kind, rank, alpha, w));
  attn_lora *fresh = attn_alloc_zero(sizeof *fresh);
  if (!fresh) return ATTN_OUT_OF_MEMORY;
  fresh->adapter.apply = apply;
  fresh->kind = kind;
  fresh->rank = rank;
  fresh->scale = attn_lora_scale(kind, rank, alpha);
  attn_status status = fill(fresh, w, compute, seed, stream);
  if (status == ATTN_OK)
    *lora = fresh;
  else
    attn_lora_destroy(fresh);
  return status;
}

int attn_lora_list(attn_lora *lora, attn_parameter *list[ATTN_LORA_PARAMETERS]) {
  list[0] = &lora->a;
  list[1] = &lora->b;
  list[2] = &lora->magnitude;
  return lora->kind == ATTN_LORA_DORA ? 3 : 2;
}

void attn_lora_destroy(attn_lora *lora) {
  attn_parameter *list[ATTN_LORA_PARAMETERS];
  int count = lora ? attn_lora_list(lora, list) : 0;
  for (int i = 0; i < count; ++i) {
    attn_weight_destroy(list[i]->weight);
    attn_tensor_destroy(&list[i]->gradient);
    attn_tensor_destroy(&list[i]->value);
    attn_free((void *)(uintptr_t)list[i]->name);
  }
  if (lora) attn_free(lora->squares);
  attn_free(lora);
}

/* Merging ---------------------------------------------------------------------------------------
 */

/* What merging reads, in the processor's memory. */
typedef struct merging {
  const attn_lora *lora;
  attn_tensor w, a, b, m; /* float64 but for w, whose dtype is a master's */
} merging;

/* Row j of what is to be used instead of W. */
static attn_status merge_row(const merging *from, int64_t j, double *row,
                             const attn_tensor *merged) {
  const attn_lora *lora = from->lora;
  int64_t inputs = merged->shape[1];
  const double *a = from->a.data, *b = (const double *)from->b.data + j * lora->rank;
  attn_tensor source, target;
  ATTN_TRY(attn_tensor_wrap(row, ATTN_F64, 1, &inputs, &target));
  ATTN_TRY(attn_tensor_select(&from->w, 0, j, &source));
  ATTN_TRY(attn_tensor_copy(&source, &target));
  for (int64_t k = 0; k < lora->rank; ++k)
    for (int64_t i = 0; i < inputs; ++i) row[i] += lora->scale * b[k] * a[k * inputs + i];
  if (lora->kind == ATTN_LORA_DORA) {
    double norm = sqrt(dot(row, row, inputs));
    double factor = norm > 0 ? ((const double *)from->m.data)[j] / norm : 0;
    for (int64_t i = 0; i < inputs; ++i) row[i] *= factor;
  }
  source = target;
  ATTN_TRY(attn_tensor_select(merged, 0, j, &target));
  return attn_tensor_copy(&source, &target);
}

static attn_status merge_rows(const merging *from, const attn_tensor *merged) {
  int64_t outputs = merged->shape[0], inputs = merged->shape[1];
  int threads = attn_get_threads(), failed = 0;
  double *rows = attn_alloc_array((size_t)threads, (size_t)inputs * sizeof *rows);
  if (!rows) return ATTN_OUT_OF_MEMORY;
  int64_t share = (outputs + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : failed)
  for (int t = 0; t < threads; ++t)
    for (int64_t j = t * share; j < (t + 1) * share && j < outputs; ++j)
      failed += merge_row(from, j, rows + t * inputs, merged) != ATTN_OK;
  attn_free(rows);
  return failed ? attn_fail(ATTN_UNSUPPORTED, "lora: rows as %s", attn_dtype_name(merged->dtype))
                : ATTN_OK;
}

attn_status attn_lora_merge(const attn_lora *lora, const attn_parameter *w, attn_dtype dtype,
                            attn_tensor *merged) {
  merging from = {.lora = lora};
  attn_status status = attn_tensor_create(dtype, 2, w->value.shape, merged);
  if (status != ATTN_OK) return status;
  status = attn_parameter_copy(w, w->value.dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32, &from.w);
  if (status == ATTN_OK) status = attn_parameter_copy(&lora->a, ATTN_F64, &from.a);
  if (status == ATTN_OK) status = attn_parameter_copy(&lora->b, ATTN_F64, &from.b);
  if (status == ATTN_OK && lora->kind == ATTN_LORA_DORA)
    status = attn_parameter_copy(&lora->magnitude, ATTN_F64, &from.m);
  if (status == ATTN_OK) status = merge_rows(&from, merged);
  attn_tensor_destroy(&from.w);
  attn_tensor_destroy(&from.a);
  attn_tensor_destroy(&from.b);
  attn_tensor_destroy(&from.m);
  if (status != ATTN_OK) attn_tensor_destroy(merged);
  return status;
}
