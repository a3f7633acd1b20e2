/* The recurrent engine against its token-by-token oracle, over pseudo-random problems; its
 * identities (catalogue entries Lightning Attention-2 and Kimi Linear); and its refusals. */
#include "support/test.h"

#include "attn/recurrent.h"
#include "base/memory.h"
#include "base/random.h"
#include "engines/plan.h"
#include "oracles/recurrent.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- One problem with all its tensors -------------------------------------------------------- */

enum {
  Q,
  K,
  V,
  O,
  G,
  BETA,
  S0,
  S1,
  Z0,
  Z1,
  DO,
  DS1,
  DZ1,
  DQ,
  DK,
  DV,
  DG,
  DBETA,
  DS0,
  DZ0,
  TENSORS
};
static const char *const names[TENSORS] = {"q",  "k",  "v",  "o",     "g",   "beta", "s0",
                                           "s1", "z0", "z1", "do",    "ds1", "dz1",  "dq",
                                           "dk", "dv", "dg", "dbeta", "ds0", "dz0"};

/* Values in float64, row-major with heads and value heads apart, as the engine's shapes say. */
typedef struct fixture {
  attn_recurrent_problem problem;
  int64_t total;             /* tokens of all sequences */
  int32_t offsets[9];        /* always filled in */
  double *value[TENSORS];    /* what goes in, rounded to the dtype; for outputs what came out */
  double *expected[TENSORS]; /* outputs of the oracle */
  bool initial, final_gradient;
  double strength; /* mean log decay */
  int layout;      /* 0 contiguous, 1 padded rows, 2 heads outermost */
  uint64_t seed;
} fixture;

static bool is_real(int i) {
  return i == G || i == BETA || i == S0 || i == S1 || i == Z0 || i == Z1 || i == DS1 || i == DZ1 ||
         i == DG || i == DBETA || i == DS0 || i == DZ0;
}

static attn_dtype dtype_of(const fixture *f, int i) {
  return f->problem.dtype == ATTN_F64 ? ATTN_F64 : is_real(i) ? ATTN_F32 : f->problem.dtype;
}

static bool exists(const fixture *f, int i) {
  const attn_recurrent_problem *p = &f->problem;
  switch (i) {
  case G:
  case DG: return p->decay != ATTN_DECAY_NONE;
  case BETA:
  case DBETA: return p->update == ATTN_UPDATE_DELTA;
  case Z0: return p->normalise && f->initial;
  case Z1:
  case DZ0: return p->normalise;
  case DZ1: return p->normalise && f->final_gradient;
  case S0: return f->initial;
  case DS1: return f->final_gradient;
  default: return true;
  }
}

static int shape_of(const fixture *f, int i, int64_t *shape) {
  const attn_recurrent_problem *p = &f->problem;
  int rank = 0;
  bool state = i == S0 || i == S1 || i == DS1 || i == DS0;
  if (state || i == Z0 || i == Z1 || i == DZ1 || i == DZ0) {
    shape[rank++] = p->batch;
    shape[rank++] = p->value_heads;
    shape[rank++] = p->dim;
    if (state) shape[rank++] = p->value_dim;
    return rank;
  }
  if ((i == G || i == DG) && p->decay == ATTN_DECAY_HEAD) {
    shape[0] = p->value_heads;
    return 1;
  }
  if (!p->ragged) shape[rank++] = p->batch;
  shape[rank++] = p->ragged ? f->total : p->length;
  bool key = i == Q || i == K || i == DQ || i == DK;
  shape[rank++] = key ? p->heads : p->value_heads;
  if (key || ((i == G || i == DG) && p->decay == ATTN_DECAY_CHANNEL)) shape[rank++] = p->dim;
  if (i == V || i == O || i == DO || i == DV) shape[rank++] = p->value_dim;
  return rank;
}

static int64_t count_of(const fixture *f, int i) {
  int64_t shape[ATTN_MAX_RANK], count = 1;
  int rank = shape_of(f, i, shape);
  for (int d = 0; d < rank; ++d) count *= shape[d];
  return count;
}

static double round_to(double x, attn_dtype dtype) {
  attn_tensor from, to;
  double y;
  uint64_t bits;
  int64_t one = 1;
  assert_ok(attn_tensor_wrap(&x, ATTN_F64, 1, &one, &from));
  assert_ok(attn_tensor_wrap(&bits, dtype, 1, &one, &to));
  assert_ok(attn_tensor_copy(&from, &to));
  from.data = &y;
  assert_ok(attn_tensor_copy(&to, &from));
  return y;
}

static void make_keys(fixture *f) { /* unit length for the delta rule, positive to normalise */
  for (int64_t r = 0; r < f->total * f->problem.heads; ++r)
    for (int i = Q; i <= K; ++i) {
      double *x = f->value[i] + r * f->problem.dim, norm = 1e-12;
      for (int64_t c = 0; c < f->problem.dim; ++c) {
        if (f->problem.normalise) x[c] = fabs(x[c]) + 0.1;
        norm += x[c] * x[c];
      }
      for (int64_t c = 0; c < f->problem.dim; ++c) x[c] /= sqrt(norm);
    }
}

static void make_gates(fixture *f) {
  attn_random random = {.seed = f->seed, .stream = 99};
  for (int64_t i = 0; i < count_of(f, BETA); ++i) f->value[BETA][i] = attn_random_uniform(&random);
  if (!f->value[G]) return;
  for (int64_t i = 0; i < count_of(f, G); ++i) {
    double x = -f->strength * 2 * attn_random_uniform(&random);
    uint64_t kind = f->strength < 2 ? 0 : attn_random_below(&random, 8);
    f->value[G][i] = kind == 1 ? 0 : kind == 2 ? -1e-6 : kind == 3 ? -1e30 : x;
  }
}

static void fixture_fill(fixture *f) {
  const attn_recurrent_problem *p = &f->problem;
  attn_random random = {.seed = f->seed, .stream = 7};
  f->total = 0;
  for (int64_t b = 0; b < p->batch; ++b) {
    int64_t length = p->length;
    if (p->ragged && b) length = (int64_t)attn_random_below(&random, (uint64_t)p->length + 1);
    f->offsets[b + 1] = (int32_t)(f->total += length);
  }
  for (int i = 0; i < TENSORS; ++i) {
    int64_t count = count_of(f, i);
    f->value[i] = calloc((size_t)count + 1, sizeof(double));
    f->expected[i] = calloc((size_t)count + 1, sizeof(double));
    assert_non_null(f->value[i]);
    assert_non_null(f->expected[i]);
    if (i != O && i != S1 && i != Z1 && i < DQ)
      test_fill_normal(f->value[i], count, 0, 1, f->seed * 64 + (uint64_t)i);
  }
  make_keys(f);
  make_gates(f);
  for (int64_t i = 0; i < count_of(f, Z0); ++i)
    f->value[Z0][i] = fabs(f->value[Z0][i]); /* the denominator stays positive */
  for (int i = 0; i < DQ; ++i)
    for (int64_t n = 0; n < count_of(f, i); ++n)
      f->value[i][n] = round_to(f->value[i][n], dtype_of(f, i));
}

static void fixture_free(fixture *f) {
  for (int i = 0; i < TENSORS; ++i) {
    free(f->value[i]);
    free(f->expected[i]);
  }
}

/* ---- The oracle on the fixture, head by head ------------------------------------------------- */

/* Copies [tokens, width] of one head between a tensor of the fixture and a contiguous buffer. */
static void head_rows(const fixture *f, int i, double *tensor, double *buffer, int64_t b, int64_t h,
                      int direction) {
  int64_t shape[ATTN_MAX_RANK];
  int rank = shape_of(f, i, shape), axis = f->problem.ragged ? 0 : 1;
  int64_t heads = shape[axis + 1], width = rank > axis + 2 ? shape[axis + 2] : 1;
  for (int64_t t = 0; t < f->offsets[b + 1] - f->offsets[b]; ++t)
    for (int64_t c = 0; c < width; ++c) {
      double *at = tensor + ((f->offsets[b] + t) * heads + h) * width + c;
      double *own = buffer + t * width + c;
      if (direction == 0) *own = *at;
      if (direction == 1) *at = *own;
      if (direction == 2) *at += *own;
    }
}

static double *gather(const fixture *f, int i, int64_t b, int64_t h) {
  double *buffer = calloc((size_t)(count_of(f, i) + 1), sizeof(double));
  assert_non_null(buffer);
  head_rows(f, i, f->value[i], buffer, b, h, 0);
  return buffer;
}

static void oracle_head(fixture *f, int64_t b, int64_t h) {
  const attn_recurrent_problem *p = &f->problem;
  int64_t reader = h / (p->value_heads / p->heads), state = p->dim * p->value_dim;
  int64_t at = b * p->value_heads + h;
  double *in[TENSORS] = {0}, *out[TENSORS] = {0};
  for (int i = 0; i < TENSORS; ++i) {
    bool key = i == Q || i == K;
    if (key || i == V || i == BETA || i == DO || (i == G && p->decay > ATTN_DECAY_HEAD))
      in[i] = exists(f, i) ? gather(f, i, b, key ? reader : h) : NULL;
    out[i] = calloc((size_t)(count_of(f, i) + 1), sizeof(double));
  }
  oracle_recurrent x = {
      .tokens = f->offsets[b + 1] - f->offsets[b],
      .dim = p->dim,
      .value_dim = p->value_dim,
      .decay = (oracle_decay)p->decay,
      .delta = p->update == ATTN_UPDATE_DELTA,
      .normalise = p->normalise,
      .scale = p->scale == 0 ? 1 : p->scale,
      .epsilon = p->epsilon == 0 ? 1e-6 : p->epsilon,
      .q = in[Q],
      .k = in[K],
      .v = in[V],
      .g = p->decay == ATTN_DECAY_HEAD ? f->value[G] + h : in[G],
      .beta = in[BETA],
      .s0 = exists(f, S0) ? f->value[S0] + at * state : NULL,
      .z0 = exists(f, Z0) ? f->value[Z0] + at * p->dim : NULL,
      .o = out[O],
      .s1 = f->expected[S1] + at * state,
      .z1 = f->expected[Z1] + at * p->dim,
      .d_o = in[DO],
      .d_s1 = exists(f, DS1) ? f->value[DS1] + at * state : NULL,
      .d_z1 = exists(f, DZ1) ? f->value[DZ1] + at * p->dim : NULL,
      .dq = out[DQ],
      .dk = out[DK],
      .dv = out[DV],
      .dg = out[DG],
      .dbeta = out[DBETA],
      .ds0 = f->expected[DS0] + at * state,
      .dz0 = f->expected[DZ0] + at * p->dim,
  };
  oracle_recurrent_forward(&x);
  head_rows(f, O, f->expected[O], out[O], b, h, 1);
  if (p->passes & ATTN_PASS_BACKWARD) {
    oracle_recurrent_backward(&x);
    head_rows(f, DQ, f->expected[DQ], out[DQ], b, reader, 2);
    head_rows(f, DK, f->expected[DK], out[DK], b, reader, 2);
    head_rows(f, DV, f->expected[DV], out[DV], b, h, 1);
    if (exists(f, DBETA)) head_rows(f, DBETA, f->expected[DBETA], out[DBETA], b, h, 1);
    if (p->decay == ATTN_DECAY_HEAD) f->expected[DG][h] += out[DG][0];
    if (p->decay > ATTN_DECAY_HEAD) head_rows(f, DG, f->expected[DG], out[DG], b, h, 1);
  }
  for (int i = 0; i < TENSORS; ++i) {
    free(in[i]);
    free(out[i]);
  }
}

static void oracle_run(fixture *f) {
  for (int64_t b = 0; b < f->problem.batch; ++b)
    for (int64_t h = 0; h < f->problem.value_heads; ++h) oracle_head(f, b, h);
}

/* ---- The engine on the fixture --------------------------------------------------------------- */

/* A tensor of the fixture's layout, poisoned, then filled with x unless NULL. `base` is what to
 * free. */
static attn_tensor make_tensor(const fixture *f, int i, const double *x, void **base) {
  int64_t shape[ATTN_MAX_RANK], memory[ATTN_MAX_RANK];
  int axes[ATTN_MAX_RANK], rank = shape_of(f, i, shape), first = f->problem.ragged ? 0 : 1;
  bool state =
      i == S0 || i == S1 || i == Z0 || i == Z1 || i == DS1 || i == DZ1 || i == DS0 || i == DZ0;
  attn_tensor tensor, source;
  for (int d = 0; d < rank; ++d) axes[d] = d;
  if (f->layout == 2 && !state && rank >= first + 2) { /* heads before tokens in memory */
    axes[first] = first + 1;
    axes[first + 1] = first;
  }
  for (int d = 0; d < rank; ++d) memory[d] = shape[axes[d]];
  if (f->layout) memory[rank - 1] += 3;
  assert_ok(attn_tensor_create(dtype_of(f, i), rank, memory, &tensor));
  *base = tensor.data;
  assert_ok(attn_tensor_fill(&tensor, NAN));
  assert_ok(attn_tensor_permute(&tensor, axes, &tensor));
  for (int d = 0; d < rank; ++d) assert_ok(attn_tensor_slice(&tensor, d, 0, shape[d], &tensor));
  if (x) {
    assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, rank, shape, &source));
    assert_ok(attn_tensor_copy(&source, &tensor));
  }
  return tensor;
}

static attn_tensor *slot(attn_recurrent_args *a, int i) {
  attn_tensor *const slots[TENSORS] = {&a->q,
                                       &a->k,
                                       &a->v,
                                       &a->o,
                                       &a->decay,
                                       &a->beta,
                                       &a->initial_state,
                                       &a->final_state,
                                       &a->initial_normaliser,
                                       &a->final_normaliser,
                                       &a->d_o,
                                       &a->d_final_state,
                                       &a->d_final_normaliser,
                                       &a->d_q,
                                       &a->d_k,
                                       &a->d_v,
                                       &a->d_decay,
                                       &a->d_beta,
                                       &a->d_initial_state,
                                       &a->d_initial_normaliser};
  return slots[i];
}

static bool is_output(int i) {
  return i == O || i == S1 || i == Z1 || i >= DQ;
}

static void *make_workspace(const attn_plan *plan) {
  attn_plan_info info;
  assert_ok(attn_plan_get_info(plan, &info));
  void *workspace = attn_alloc(info.workspace_bytes);
  assert_non_null(workspace);
  memset(workspace, 0xff, info.workspace_bytes); /* NaN everywhere */
  return workspace;
}

/* Runs the passes that the problem asks for; outputs land in f->value. */
static void engine_run(fixture *f) {
  attn_recurrent_args args = {.offsets = f->problem.ragged ? f->offsets : NULL};
  void *base[TENSORS] = {0};
  attn_plan *plan;
  assert_ok(attn_recurrent_plan(&f->problem, &plan));
  void *workspace = make_workspace(plan);
  for (int i = 0; i < TENSORS; ++i)
    if (exists(f, i))
      *slot(&args, i) = make_tensor(f, i, is_output(i) ? NULL : f->value[i], base + i);
  assert_ok(attn_recurrent_forward(plan, &args, workspace));
  if (f->problem.passes & ATTN_PASS_BACKWARD)
    assert_ok(attn_recurrent_backward(plan, &args, workspace));
  for (int i = 0; i < TENSORS; ++i) {
    if (!exists(f, i)) continue;
    attn_tensor tensor = *slot(&args, i);
    if (is_output(i)) {
      free(f->value[i]);
      f->value[i] = test_to_doubles(&tensor);
    }
    tensor.data = base[i];
    attn_tensor_destroy(&tensor);
  }
  attn_free(workspace);
  attn_plan_destroy(plan);
}

/* Norms of errors relative to the norm of the result. bfloat16: unit roundoff 2^-9 in each operand
 * (q and k scaled, scores, values, state), some ten roundings that add as a random walk, with the
 * gradients through twice as many. float32: unit roundoff 2^-24 times the some hundred terms of
 * each sum and of each product of decays. float64: finite differences are not involved, only
 * rounding. */
static const double tolerance_forward[] = {
    [ATTN_F64] = 1e-12, [ATTN_F32] = 4e-6, [ATTN_BF16] = 0.012};
static const double tolerance_backward[] = {
    [ATTN_F64] = 1e-11, [ATTN_F32] = 1e-5, [ATTN_BF16] = 0.025};

/* With the delta rule a block adds up all its writes although later ones erase earlier ones: of the
 * block / dim writes in one direction the last remains, and the rounding of all (a random walk). */
static double delta_factor(const attn_recurrent_problem *p) {
  if (p->update != ATTN_UPDATE_DELTA) return 1;
  double block = (double)(p->block && p->block < p->length ? p->block : p->length);
  return 1 + sqrt(block / (double)p->dim);
}

static double norm(const double *x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] * x[i];
  return sqrt(sum);
}

/* Some gradients are differences of much larger sums, and their rounding is relative to those:
 * d_decay of q dq and k dk; with the normaliser, where o hardly depends on q and k (not at all when
 * there is one key), dq, dk and what follows from them of the do.o that the quotient subtracts. */
static double natural_size(const fixture *f, int i) {
  double sum = 0;
  for (int64_t n = 0; i == DG && n < count_of(f, Q); ++n)
    sum +=
        pow(f->value[Q][n] * f->expected[DQ][n], 2) + pow(f->value[K][n] * f->expected[DK][n], 2);
  for (int64_t n = 0; f->problem.normalise && i >= DQ && n < count_of(f, O); ++n)
    sum += pow(f->value[DO][n] * f->expected[O][n], 2);
  return sqrt(sum);
}

static void describe(const fixture *f, char *text, size_t size) {
  const attn_recurrent_problem *p = &f->problem;
  snprintf(text, size,
           "seed %llu dtype %s batch %d length %d heads %d/%d dim %d/%d decay %d update %d norm %d "
           "ragged %d block %d initial %d layout %d strength %g scale %g",
           (unsigned long long)f->seed, attn_dtype_name(p->dtype), (int)p->batch, (int)p->length,
           (int)p->heads, (int)p->value_heads, (int)p->dim, (int)p->value_dim, (int)p->decay,
           (int)p->update, (int)p->normalise, (int)p->ragged, (int)p->block, (int)f->initial,
           f->layout, f->strength, p->scale);
}

static void compare(const fixture *f) {
  char text[512];
  describe(f, text, sizeof text);
  int last = f->problem.passes & ATTN_PASS_BACKWARD ? TENSORS : DQ;
  for (int i = 0; i < last; ++i) {
    if (!is_output(i) || !exists(f, i)) continue;
    int64_t count = count_of(f, i);
    double tolerance = (i < DQ ? tolerance_forward : tolerance_backward)[f->problem.dtype];
    double difference = 0;
    tolerance *= delta_factor(&f->problem);
    for (int64_t n = 0; n < count; ++n) {
      double d = f->value[i][n] - f->expected[i][n];
      difference += isfinite(f->value[i][n]) ? d * d : INFINITY;
    }
    double allowed = tolerance * (norm(f->expected[i], count) + natural_size(f, i));
    if (!(sqrt(difference) <= allowed + 1e-30))
      fail_msg("%s: error %g, allowed %g (norm %g)\n  %s", names[i], sqrt(difference), allowed,
               norm(f->expected[i], count), text);
  }
}

static void check(fixture *f) {
  fixture_fill(f);
  oracle_run(f);
  engine_run(f);
  compare(f);
  fixture_free(f);
}

/* ---- Pseudo-random problems ------------------------------------------------------------------ */

static int64_t pick(attn_random *random, const int64_t *values, uint64_t count) {
  return values[attn_random_below(random, count)];
}

static fixture random_fixture(uint64_t seed) {
  static const int64_t lengths[] = {0, 1, 2, 3, 5, 16, 17, 33, 64, 65, 100, 130, 150};
  static const int64_t dims[] = {1, 2, 7, 16, 31, 32, 33, 48, 64, 65};
  static const int64_t blocks[] = {0, 0, 0, 1, 3, 16, 24, 32, 40, 64, 128, 256};
  static const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16, ATTN_BF16};
  attn_random r = {.seed = seed, .stream = 1};
  fixture f = {.seed = seed};
  f.problem = (attn_recurrent_problem)ATTN_RECURRENT_PROBLEM_INIT;
  attn_recurrent_problem *p = &f.problem;
  p->dtype = dtypes[attn_random_below(&r, 4)];
  p->passes = ATTN_PASS_FORWARD | (attn_random_below(&r, 3) ? ATTN_PASS_BACKWARD : 0);
  p->batch = 1 + (int64_t)attn_random_below(&r, 3);
  p->length = pick(&r, lengths, sizeof lengths / sizeof *lengths);
  p->heads = 1 + (int64_t)attn_random_below(&r, 2);
  p->value_heads = p->heads * (1 + (int64_t)attn_random_below(&r, 3));
  p->dim = pick(&r, dims, sizeof dims / sizeof *dims);
  p->value_dim = pick(&r, dims, sizeof dims / sizeof *dims);
  p->decay = (attn_decay)attn_random_below(&r, 4);
  p->update = (attn_update)attn_random_below(&r, 2);
  p->normalise = attn_random_below(&r, 4) == 0;
  p->ragged = attn_random_below(&r, 3) == 0;
  p->block = pick(&r, blocks, sizeof blocks / sizeof *blocks);
  p->scale = attn_random_below(&r, 2) ? 0.37 : 0;
  f.initial = attn_random_below(&r, 2);
  f.final_gradient = attn_random_below(&r, 2);
  f.layout = (int)attn_random_below(&r, 3);
  f.strength = attn_random_below(&r, 4) == 0 ? 25 : 0.1;
  return f;
}

static void sample(void *context) {
  uint64_t count = *(const uint64_t *)context;
  for (uint64_t seed = 1; seed <= count; ++seed) {
    fixture f = random_fixture(seed);
    check(&f);
  }
}

static void random_problems_match_oracle(void **state) {
  (void)state;
  uint64_t count = 150;
  test_on_every_path(sample, &count);
}

static void threads_and_slices_change_nothing(void **state) {
  (void)state;
  assert_ok(attn_set_threads(5));
  for (uint64_t seed = 1000; seed < 1030; ++seed) {
    fixture f = random_fixture(seed);
    f.problem.batch = 1; /* few heads: the value dimension is sliced */
    f.problem.heads = f.problem.value_heads = 1;
    f.problem.value_dim += 33;
    check(&f);
  }
  assert_ok(attn_set_threads(0));
}

/* ---- Identities, in float64 on one sequence -------------------------------------------------- */

enum { MAX_TOKENS = 64, MAX_DIM = 24, HEADS = 2 };
typedef double tokens_by_dim[MAX_TOKENS * HEADS * MAX_DIM];
typedef double states[HEADS * MAX_DIM * MAX_DIM];

/* Contiguous arrays; absent ones are NULL in `use`. */
typedef struct line {
  attn_recurrent_problem problem;
  tokens_by_dim q, k, v, g, o;
  double beta[MAX_TOKENS * HEADS];
  states s0, s1;
  double z0[HEADS * MAX_DIM], z1[HEADS * MAX_DIM];
  bool initial;
} line;

/* What the identities hold to: float64 rounding over sums of some hundred terms. */
static const double identity_tolerance = 1e-12;

static attn_tensor wrap(double *x, int rank, int64_t a, int64_t b, int64_t c, int64_t d) {
  int64_t shape[] = {a, b, c, d};
  attn_tensor tensor;
  assert_ok(attn_tensor_wrap(x, ATTN_F64, rank, shape, &tensor));
  return tensor;
}

static void make_line(line *l, attn_decay decay, attn_update update, bool normalise,
                      uint64_t seed) {
  memset(l, 0, sizeof *l);
  l->problem = (attn_recurrent_problem)ATTN_RECURRENT_PROBLEM_INIT;
  l->problem.dtype = ATTN_F64;
  l->problem.length = 50;
  l->problem.heads = l->problem.value_heads = HEADS;
  l->problem.dim = 20;
  l->problem.value_dim = 24;
  l->problem.decay = decay;
  l->problem.update = update;
  l->problem.normalise = normalise;
  l->initial = true;
  test_fill_normal(l->q, MAX_TOKENS * HEADS * MAX_DIM, 0, 1, seed);
  test_fill_normal(l->k, MAX_TOKENS * HEADS * MAX_DIM, 0, 1, seed + 1);
  test_fill_normal(l->v, MAX_TOKENS * HEADS * MAX_DIM, 0, 1, seed + 2);
  test_fill_normal(l->g, MAX_TOKENS * HEADS * MAX_DIM, 0, 0.3, seed + 3);
  test_fill_normal(l->beta, MAX_TOKENS * HEADS, 0, 1, seed + 4);
  test_fill_normal(l->s0, HEADS * MAX_DIM * MAX_DIM, 0, 1, seed + 5);
  test_fill_normal(l->z0, HEADS * MAX_DIM, 0, 1, seed + 6);
  for (int i = 0; i < MAX_TOKENS * HEADS * MAX_DIM; ++i) {
    l->g[i] = -fabs(l->g[i]);
    if (normalise) l->q[i] = fabs(l->q[i]), l->k[i] = fabs(l->k[i]);
  }
  for (int i = 0; i < MAX_TOKENS * HEADS; ++i) l->beta[i] = 1 / (1 + exp(-l->beta[i]));
  for (int i = 0; i < HEADS * MAX_DIM; ++i) l->z0[i] = fabs(l->z0[i]);
  for (int r = 0; r < MAX_TOKENS * HEADS; ++r) { /* keys of unit length */
    double norm_k = norm(l->k + r * l->problem.dim, l->problem.dim);
    for (int64_t c = 0; c < l->problem.dim; ++c) l->k[r * l->problem.dim + c] /= norm_k;
  }
}

static attn_recurrent_args line_args(line *l) {
  const attn_recurrent_problem *p = &l->problem;
  int64_t n = p->length, h = HEADS;
  attn_recurrent_args a = {0};
  a.q = wrap(l->q, 4, 1, n, h, p->dim);
  a.k = wrap(l->k, 4, 1, n, h, p->dim);
  a.v = wrap(l->v, 4, 1, n, h, p->value_dim);
  a.o = wrap(l->o, 4, 1, n, h, p->value_dim);
  if (p->decay == ATTN_DECAY_HEAD) a.decay = wrap(l->g, 1, h, 0, 0, 0);
  if (p->decay == ATTN_DECAY_TOKEN) a.decay = wrap(l->g, 3, 1, n, h, 0);
  if (p->decay == ATTN_DECAY_CHANNEL) a.decay = wrap(l->g, 4, 1, n, h, p->dim);
  if (p->update == ATTN_UPDATE_DELTA) a.beta = wrap(l->beta, 3, 1, n, h, 0);
  if (l->initial) a.initial_state = wrap(l->s0, 4, 1, h, p->dim, p->value_dim);
  a.final_state = wrap(l->s1, 4, 1, h, p->dim, p->value_dim);
  if (p->normalise) {
    if (l->initial) a.initial_normaliser = wrap(l->z0, 3, 1, h, p->dim, 0);
    a.final_normaliser = wrap(l->z1, 3, 1, h, p->dim, 0);
  }
  return a;
}

static void run_args(const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                     attn_pass pass) {
  attn_plan *plan;
  attn_recurrent_problem own = *problem;
  own.passes = (int)pass;
  assert_ok(attn_recurrent_plan(&own, &plan));
  void *workspace = make_workspace(plan);
  if (pass == ATTN_PASS_FORWARD)
    assert_ok(attn_recurrent_forward(plan, args, workspace));
  else
    assert_ok(attn_recurrent_backward(plan, args, workspace));
  attn_free(workspace);
  attn_plan_destroy(plan);
}

static void run_line(line *l) {
  attn_recurrent_args args = line_args(l);
  run_args(&l->problem, &args, ATTN_PASS_FORWARD);
}

static void assert_close(const double *a, const double *b, int64_t count, const char *what) {
  double error = test_relative_error(a, b, count);
  if (!(error <= identity_tolerance)) fail_msg("%s: relative error %g", what, error);
}

static void assert_same_lines(const line *a, const line *b, const char *what) {
  const attn_recurrent_problem *p = &a->problem;
  assert_close(a->o, b->o, p->length * HEADS * p->value_dim, what);
  assert_close(a->s1, b->s1, HEADS * p->dim * p->value_dim, what);
  if (p->normalise) assert_close(a->z1, b->z1, HEADS * p->dim, what);
}

/* Calls body for every decay, update and normaliser. */
static void for_every_kind(void (*body)(attn_decay, attn_update, bool)) {
  for (int decay = 0; decay < 4; ++decay)
    for (int update = 0; update < 2; ++update)
      for (int normalise = 0; normalise < 2; ++normalise)
        body((attn_decay)decay, (attn_update)update, normalise);
}

static line first, second; /* too large for the stack */

static void check_blocks(attn_decay decay, attn_update update, bool normalise) {
  static const int64_t blocks[] = {0, 2, 16, 17, 32, 50, 64};
  make_line(&first, decay, update, normalise, 1);
  first.problem.block = 1; /* the recurrence */
  run_line(&first);
  for (size_t i = 0; i < sizeof blocks / sizeof *blocks; ++i) {
    make_line(&second, decay, update, normalise, 1);
    second.problem.block = blocks[i];
    run_line(&second);
    assert_same_lines(&second, &first, "block size");
  }
}

static void result_is_independent_of_block(void **state) {
  (void)state;
  for_every_kind(check_blocks);
}

/* The tokens from `from` on, as a problem of their own. */
static void run_part(line *l, int64_t from, int64_t count) {
  attn_recurrent_problem part = l->problem;
  attn_recurrent_args args = line_args(l);
  attn_tensor *tensors[] = {&args.q, &args.k, &args.v, &args.o, &args.decay, &args.beta};
  part.length = count;
  for (int i = 0; i < 6; ++i)
    if (tensors[i]->data && tensors[i]->rank > 1)
      assert_ok(attn_tensor_slice(tensors[i], 1, from, count, tensors[i]));
  args.final_state = args.initial_state; /* in place */
  args.final_normaliser = args.initial_normaliser;
  run_args(&part, &args, ATTN_PASS_FORWARD);
}

static void check_splits(attn_decay decay, attn_update update, bool normalise) {
  static const int64_t cuts[][8] = {
      {7, 43}, {50}, {1, 2, 3, 4, 5, 35}, {16, 1, 1, 1, 31}, {0, 49, 1}};
  make_line(&first, decay, update, normalise, 2);
  run_line(&first);
  for (size_t i = 0; i < sizeof cuts / sizeof *cuts; ++i) {
    make_line(&second, decay, update, normalise, 2);
    int64_t at = 0;
    for (int j = 0; j < 8 && at < second.problem.length; at += cuts[i][j++])
      run_part(&second, at, cuts[i][j]);
    memcpy(second.s1, second.s0, sizeof second.s1);
    memcpy(second.z1, second.z0, sizeof second.z1);
    assert_same_lines(&second, &first, "split");
  }
}

static void splitting_anywhere_is_the_same(void **state) {
  (void)state;
  for_every_kind(check_splits);
}

static void check_stepping(attn_decay decay, attn_update update, bool normalise) {
  make_line(&first, decay, update, normalise, 3);
  make_line(&second, decay, update, normalise, 3);
  run_line(&first);
  for (int64_t t = 0; t < second.problem.length; ++t) run_part(&second, t, 1);
  memcpy(second.s1, second.s0, sizeof second.s1);
  memcpy(second.z1, second.z0, sizeof second.z1);
  assert_same_lines(&second, &first, "stepping");
}

static void stepping_equals_prefill(void **state) {
  (void)state;
  for_every_kind(check_stepping);
}

/* O = ((Q K^T) (.) D) V, D_ij = lambda^(i - j), straight from the definition. */
static void quadratic(const line *l, const double *g, double *o) {
  const attn_recurrent_problem *p = &l->problem;
  memset(o, 0, sizeof l->o);
  for (int64_t h = 0; h < HEADS; ++h)
    for (int64_t i = 0; i < p->length; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        double score = 0;
        for (int64_t c = 0; c < p->dim; ++c)
          score += l->q[(i * HEADS + h) * p->dim + c] * l->k[(j * HEADS + h) * p->dim + c];
        score *= g ? pow(exp(g[h]), (double)(i - j)) : 1;
        for (int64_t c = 0; c < p->value_dim; ++c)
          o[(i * HEADS + h) * p->value_dim + c] += score * l->v[(j * HEADS + h) * p->value_dim + c];
      }
}

static void lightning_equals_quadratic_form(void **state) {
  (void)state;
  static tokens_by_dim expected;
  for (int decay = ATTN_DECAY_NONE; decay <= ATTN_DECAY_HEAD; ++decay) {
    make_line(&first, (attn_decay)decay, ATTN_UPDATE_ADDITIVE, false, 4);
    first.initial = false;
    run_line(&first);
    quadratic(&first, decay ? first.g : NULL, expected);
    assert_close(first.o, expected, first.problem.length * HEADS * first.problem.value_dim,
                 "quadratic form");
  }
}

static void no_memory_when_the_decay_vanishes(void **state) {
  (void)state;
  static const double strong[] = {-1e30, -INFINITY, -800};
  for (int s = 0; s < 3; ++s)
    for (int decay = ATTN_DECAY_HEAD; decay <= ATTN_DECAY_CHANNEL; ++decay) {
      make_line(&first, (attn_decay)decay, ATTN_UPDATE_ADDITIVE, false, 5);
      for (int i = 0; i < MAX_TOKENS * HEADS * MAX_DIM; ++i) first.g[i] = strong[s];
      run_line(&first);
      const attn_recurrent_problem *p = &first.problem;
      for (int64_t r = 0; r < p->length * HEADS; ++r) {
        double score = 0;
        for (int64_t c = 0; c < p->dim; ++c)
          score += first.q[r * p->dim + c] * first.k[r * p->dim + c];
        for (int64_t c = 0; c < p->value_dim; ++c)
          assert_true(fabs(first.o[r * p->value_dim + c] - score * first.v[r * p->value_dim + c]) <
                      1e-12);
      }
    }
}

static void zero_log_decay_is_no_decay(void **state) {
  (void)state;
  for (int update = 0; update < 2; ++update) /* with the delta rule: alpha = 1 is DeltaNet */
    for (int decay = ATTN_DECAY_HEAD; decay <= ATTN_DECAY_CHANNEL; ++decay) {
      make_line(&first, ATTN_DECAY_NONE, (attn_update)update, false, 6);
      make_line(&second, (attn_decay)decay, (attn_update)update, false, 6);
      memset(second.g, 0, sizeof second.g);
      run_line(&first);
      run_line(&second);
      assert_same_lines(&second, &first, "log decay 0");
    }
}

static void equal_channels_are_one_decay_a_token(void **state) {
  (void)state;
  for (int update = 0; update < 2; ++update) { /* KDA is Gated DeltaNet then */
    make_line(&first, ATTN_DECAY_TOKEN, (attn_update)update, true, 7);
    make_line(&second, ATTN_DECAY_CHANNEL, (attn_update)update, true, 7);
    for (int64_t r = 0; r < first.problem.length * HEADS; ++r)
      for (int64_t c = 0; c < first.problem.dim; ++c)
        second.g[r * first.problem.dim + c] = first.g[r];
    run_line(&first);
    run_line(&second);
    assert_same_lines(&second, &first, "equal channels");
  }
}

static void key_slices_add_up(void **state) {
  (void)state;
  static tokens_by_dim sum;
  make_line(&first, ATTN_DECAY_TOKEN, ATTN_UPDATE_ADDITIVE, false, 8);
  first.initial = false;
  run_line(&first);
  memset(sum, 0, sizeof sum);
  int64_t cuts[] = {0, 7, 8, first.problem.dim}, count = first.problem.length * HEADS * 24;
  for (int i = 0; i < 3; ++i) {
    make_line(&second, ATTN_DECAY_TOKEN, ATTN_UPDATE_ADDITIVE, false, 8);
    second.initial = false;
    attn_recurrent_args args = line_args(&second);
    attn_recurrent_problem part = second.problem;
    part.dim = cuts[i + 1] - cuts[i];
    assert_ok(attn_tensor_slice(&args.q, 3, cuts[i], part.dim, &args.q));
    assert_ok(attn_tensor_slice(&args.k, 3, cuts[i], part.dim, &args.k));
    assert_ok(attn_tensor_slice(&args.final_state, 2, 0, part.dim, &args.final_state));
    run_args(&part, &args, ATTN_PASS_FORWARD);
    for (int64_t n = 0; n < count; ++n) sum[n] += second.o[n];
  }
  assert_close(sum, first.o, count, "slices of the key dimension");
}

static void no_writing_leaves_only_decay(void **state) {
  (void)state;
  make_line(&first, ATTN_DECAY_CHANNEL, ATTN_UPDATE_DELTA, false, 9);
  memset(first.beta, 0, sizeof first.beta);
  run_line(&first);
  const attn_recurrent_problem *p = &first.problem;
  for (int64_t h = 0; h < HEADS; ++h)
    for (int64_t c = 0; c < p->dim; ++c) {
      double sum = 0;
      for (int64_t t = 0; t < p->length; ++t) sum += first.g[(t * HEADS + h) * p->dim + c];
      for (int64_t j = 0; j < p->value_dim; ++j) {
        int64_t at = (h * p->dim + c) * p->value_dim + j;
        assert_true(fabs(first.s1[at] - exp(sum) * first.s0[at]) < 1e-12);
      }
    }
}

static void delta_rule_writes_perfectly(void **state) {
  (void)state;
  make_line(&first, ATTN_DECAY_NONE, ATTN_UPDATE_DELTA, false, 10);
  const attn_recurrent_problem *p = &first.problem;
  for (int i = 0; i < MAX_TOKENS * HEADS; ++i) first.beta[i] = 1;
  for (int64_t t = 1; t < p->length; t += 2) /* every other token writes the same key again */
    memcpy(first.k + t * HEADS * p->dim, first.k + (t - 1) * HEADS * p->dim,
           (size_t)(HEADS * p->dim) * sizeof(double));
  memcpy(first.q, first.k, sizeof first.q);
  run_line(&first);
  assert_close(first.o, first.v, p->length * HEADS * p->value_dim, "perfect write");
}

static void orthonormal_keys_make_delta_additive(void **state) {
  (void)state;
  make_line(&first, ATTN_DECAY_NONE, ATTN_UPDATE_ADDITIVE, false, 11);
  make_line(&second, ATTN_DECAY_NONE, ATTN_UPDATE_DELTA, false, 11);
  first.initial = second.initial = false;
  first.problem.length = second.problem.length = first.problem.dim;
  memset(first.k, 0, sizeof first.k);
  for (int64_t t = 0; t < first.problem.length; ++t)
    for (int64_t h = 0; h < HEADS; ++h)
      first.k[(t * HEADS + h) * first.problem.dim + (t * 7 + h) % first.problem.dim] = 1;
  memcpy(second.k, first.k, sizeof first.k);
  for (int i = 0; i < MAX_TOKENS * HEADS; ++i) second.beta[i] = 1;
  run_line(&first);
  run_line(&second);
  assert_same_lines(&second, &first, "orthonormal keys");
}

static void delta_state_does_not_grow(void **state) {
  (void)state;
  make_line(&first, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, false, 12);
  memset(first.v, 0, sizeof first.v);
  for (int i = 0; i < MAX_TOKENS * HEADS; ++i) first.beta[i] *= 2; /* 0 to 2 */
  run_line(&first);
  int64_t count = HEADS * first.problem.dim * first.problem.value_dim;
  assert_true(norm(first.s1, count) <= norm(first.s0, count));
}

static void ragged_equals_separate(void **state) {
  (void)state;
  static const int32_t offsets[] = {0, 3, 3, 37, 50};
  for (int update = 0; update < 2; ++update) {
    make_line(&first, ATTN_DECAY_CHANNEL, (attn_update)update, false, 13);
    const attn_recurrent_problem *p = &first.problem;
    attn_recurrent_problem ragged = *p;
    attn_recurrent_args args = line_args(&first);
    attn_tensor *tensors[] = {&args.q, &args.k, &args.v, &args.o, &args.decay, &args.beta};
    for (int i = 0; i < 6; ++i)
      if (tensors[i]->data) assert_ok(attn_tensor_select(tensors[i], 0, 0, tensors[i]));
    static double from[4 * HEADS * MAX_DIM * MAX_DIM], to[4 * HEADS * MAX_DIM * MAX_DIM];
    int64_t size = HEADS * p->dim * p->value_dim;
    for (int b = 0; b < 4; ++b) memcpy(from + b * size, first.s0, (size_t)size * sizeof(double));
    args.initial_state = wrap(from, 4, 4, HEADS, p->dim, p->value_dim);
    args.final_state = wrap(to, 4, 4, HEADS, p->dim, p->value_dim);
    args.offsets = offsets;
    ragged.batch = 4;
    ragged.length = 34;
    ragged.ragged = true;
    run_args(&ragged, &args, ATTN_PASS_FORWARD);
    make_line(&second, ATTN_DECAY_CHANNEL, (attn_update)update, false, 13);
    for (int b = 0; b < 4; ++b) {
      memcpy(second.s0, first.s0, sizeof first.s0);
      run_part(&second, offsets[b], offsets[b + 1] - offsets[b]);
      assert_close(to + b * size, second.s0, size, "state of a packed sequence");
    }
    assert_close(first.o, second.o, p->length * HEADS * p->value_dim, "packed sequences");
  }
}

/* ---- Gradients against finite differences ---------------------------------------------------- */

enum { INPUTS = 7 };

static void inputs_of(line *l, double *in[INPUTS], int64_t count[INPUTS]) {
  const attn_recurrent_problem *p = &l->problem;
  int64_t n = p->length * HEADS;
  double *all[INPUTS] = {l->q, l->k, l->v, l->g, l->beta, l->s0, l->z0};
  int64_t decays[] = {0, HEADS, n, n * p->dim};
  int64_t counts[INPUTS] = {n * p->dim,
                            n * p->dim,
                            n * p->value_dim,
                            decays[p->decay],
                            p->update ? n : 0,
                            HEADS * p->dim * p->value_dim,
                            p->normalise ? HEADS * p->dim : 0};
  memcpy(in, all, sizeof all);
  memcpy(count, counts, sizeof counts);
}

static double dot(const double *a, const double *b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

static line loss_weights; /* o, s1, z1 */

static double loss(line *l) {
  const attn_recurrent_problem *p = &l->problem;
  run_line(l);
  double sum = dot(l->o, loss_weights.o, p->length * HEADS * p->value_dim) +
               dot(l->s1, loss_weights.s1, HEADS * p->dim * p->value_dim);
  return sum + (p->normalise ? dot(l->z1, loss_weights.z1, HEADS * p->dim) : 0);
}

static void check_gradient(attn_decay decay, attn_update update, bool normalise) {
  static const char *const input_names[INPUTS] = {"q",    "k",     "v",         "decay",
                                                  "beta", "state", "normaliser"};
  static line gradient, along;
  make_line(&first, decay, update, normalise, 14);
  first.problem.length = 37;
  first.problem.block = 16;
  first.problem.scale = 0.7;
  first.problem.epsilon = 1e-3;
  const attn_recurrent_problem *p = &first.problem;
  test_fill_normal(loss_weights.o, MAX_TOKENS * HEADS * MAX_DIM, 0, 1, 90);
  test_fill_normal(loss_weights.s1, HEADS * MAX_DIM * MAX_DIM, 0, 1, 91);
  test_fill_normal(loss_weights.z1, HEADS * MAX_DIM, 0, 1, 92);
  gradient = first;
  attn_recurrent_args args = line_args(&first), to = line_args(&gradient);
  attn_recurrent_args weights =
      (loss_weights.problem = *p, loss_weights.initial = true, line_args(&loss_weights));
  args.d_o = weights.o;
  args.d_final_state = weights.final_state;
  args.d_final_normaliser = weights.final_normaliser;
  args.d_q = to.q;
  args.d_k = to.k;
  args.d_v = to.v;
  args.d_decay = to.decay;
  args.d_beta = to.beta;
  args.d_initial_state = to.initial_state;
  args.d_initial_normaliser = to.initial_normaliser;
  run_args(p, &args, ATTN_PASS_BACKWARD);
  double *in[INPUTS], *grad[INPUTS], *direction[INPUTS];
  int64_t count[INPUTS];
  inputs_of(&first, in, count);
  inputs_of(&gradient, grad, count);
  along.problem = *p;
  inputs_of(&along, direction, count);
  for (int i = 0; i < INPUTS; ++i) {
    if (!count[i]) continue;
    const double step = 1e-6; /* central: truncation (tokens step)^2, rounding 1e-14 / step */
    double values[2];
    test_fill_normal(direction[i], count[i], 0, 1, 95 + (uint64_t)i);
    for (int side = 0; side < 2; ++side) {
      double move = side ? -step : step;
      for (int64_t n = 0; n < count[i]; ++n) in[i][n] += move * direction[i][n];
      values[side] = loss(&first);
      for (int64_t n = 0; n < count[i]; ++n) in[i][n] -= move * direction[i][n];
    }
    double numeric = (values[0] - values[1]) / (2 * step);
    double exact = dot(grad[i], direction[i], count[i]);
    double size = norm(grad[i], count[i]) * norm(direction[i], count[i]);
    if (!(fabs(numeric - exact) <= 1e-7 * size))
      fail_msg("decay %d update %d normalise %d: d%s is %.12g, finite differences give %.12g",
               (int)decay, (int)update, (int)normalise, input_names[i], exact, numeric);
  }
}

static void gradients_equal_finite_differences(void **state) {
  (void)state;
  for_every_kind(check_gradient);
}

/* ---- What is refused, and what execution must not do ----------------------------------------- */

static void refuse_problem(attn_recurrent_problem problem, const char *word) {
  attn_plan *plan = (attn_plan *)&first;
  attn_status status = attn_recurrent_plan(&problem, &plan);
  if (status == ATTN_OK || plan || !strstr(attn_error_message(), word))
    fail_msg("expected a refusal that names %s, got %s: %s", word, attn_status_name(status),
             attn_error_message());
}

static void bad_problems_are_refused(void **state) {
  (void)state;
  make_line(&first, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, false, 15);
#define REFUSE(field, ...)                                                                         \
  do {                                                                                             \
    const double bad[] = {__VA_ARGS__};                                                            \
    for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {                                        \
      attn_recurrent_problem problem = first.problem;                                              \
      memset(&problem.field, 0, sizeof problem.field);                                             \
      problem.field = bad[i];                                                                      \
      refuse_problem(problem, #field);                                                             \
    }                                                                                              \
  } while (0)
  REFUSE(passes, 0, 4, -1);
  REFUSE(batch, 0, -1, 1e18);
  REFUSE(length, -1, 9e18);
  REFUSE(heads, 0, -2, 1e18);
  REFUSE(value_heads, 0, -2, 3, 1e18);
  REFUSE(dim, 0, -1, 257, 1e18);
  REFUSE(value_dim, 0, 257);
  REFUSE(block, -1, 257);
  REFUSE(scale, NAN, INFINITY);
  REFUSE(epsilon, NAN, INFINITY, -1);
  REFUSE(struct_size, 0, 8, 4096);
#undef REFUSE
  attn_recurrent_problem problem = first.problem;
  problem.dtype = ATTN_I32;
  refuse_problem(problem, "int32");
  problem = first.problem;
  problem.decay = (attn_decay)7;
  refuse_problem(problem, "decay");
  problem = first.problem;
  problem.update = (attn_update)-1;
  refuse_problem(problem, "update");
  problem = first.problem;
  problem.batch = problem.value_heads = INT32_MAX; /* each in range, the product not */
  problem.heads = 1;
  problem.length = (int64_t)1 << 40;
  refuse_problem(problem, "too large");
  assert_int_not_equal(attn_recurrent_plan(NULL, &(attn_plan *){NULL}), ATTN_OK);
  assert_int_not_equal(attn_recurrent_plan(&first.problem, NULL), ATTN_OK);
}

static attn_plan *line_plan(int passes) {
  attn_plan *plan;
  attn_recurrent_problem problem = first.problem;
  problem.passes = passes;
  assert_ok(attn_recurrent_plan(&problem, &plan));
  return plan;
}

static void refuse_args(const attn_plan *plan, const attn_recurrent_args *args, void *workspace,
                        const char *word) {
  attn_status status = attn_recurrent_forward(plan, args, workspace);
  if (status == ATTN_OK || !strstr(attn_error_message(), word))
    fail_msg("expected a refusal that names %s, got %s: %s", word, attn_status_name(status),
             attn_error_message());
}

static void bad_arguments_are_refused(void **state) {
  (void)state;
  make_line(&first, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, false, 16);
  attn_plan *plan = line_plan(ATTN_PASS_FORWARD);
  void *workspace = make_workspace(plan);
  attn_recurrent_args good = line_args(&first), args;
#define REFUSE(change, word)                                                                       \
  do {                                                                                             \
    args = good;                                                                                   \
    change;                                                                                        \
    refuse_args(plan, &args, workspace, word);                                                     \
  } while (0)
  REFUSE(args.q.data = NULL, "q is missing");
  REFUSE(args.beta.data = NULL, "beta is missing");
  REFUSE(args.decay.data = NULL, "decay is missing");
  REFUSE(args.o.data = NULL, "o is missing");
  REFUSE(args.k.shape[1] -= 1, "k has shape");
  REFUSE(args.k.rank = 3, "k has shape");
  REFUSE(args.k.rank = 1000, "k has shape");
  REFUSE(args.k.rank = -1, "k has shape");
  REFUSE(args.v.dtype = ATTN_F32, "v is float32");
  REFUSE(args.v.stride[3] = 2, "v has stride");
  REFUSE(args.o.stride[1] = 0, "o is written");
  REFUSE(args.q.device.kind = ATTN_CUDA, "q is not in CPU memory");
  REFUSE(args.initial_state.shape[2] += 1, "initial_state has shape");
  REFUSE(args.final_normaliser = good.final_state, "no normaliser");
  refuse_args(plan, &good, (char *)workspace + 8, "aligned");
  refuse_args(plan, &good, NULL, "workspace");
  refuse_args(NULL, &good, workspace, "plan");
  refuse_args(plan, NULL, workspace, "args");
#undef REFUSE
  assert_int_not_equal(attn_recurrent_backward(plan, &good, workspace), ATTN_OK);
  attn_free(workspace);
  attn_plan_destroy(plan);
}

static void bad_offsets_are_refused(void **state) {
  (void)state;
  static const int32_t bad[][3] = {{1, 2, 50}, {0, 30, 20}, {0, 0, 51}, {0, -1, 50}, {0, 50, 49}};
  make_line(&first, ATTN_DECAY_NONE, ATTN_UPDATE_ADDITIVE, false, 17);
  attn_recurrent_args args = line_args(&first);
  attn_tensor *tensors[] = {&args.q, &args.k, &args.v, &args.o};
  for (int i = 0; i < 4; ++i) assert_ok(attn_tensor_select(tensors[i], 0, 0, tensors[i]));
  args.initial_state.data = args.final_state.data = NULL;
  first.problem.ragged = true;
  first.problem.batch = 2;
  attn_plan *plan = line_plan(ATTN_PASS_FORWARD);
  void *workspace = make_workspace(plan);
  refuse_args(plan, &args, workspace, "offsets");
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
    args.offsets = bad[i];
    assert_int_not_equal(attn_recurrent_forward(plan, &args, workspace), ATTN_OK);
  }
  args.offsets = (const int32_t[]){0, 20, 50};
  assert_ok(attn_recurrent_forward(plan, &args, workspace));
  attn_free(workspace);
  attn_plan_destroy(plan);
}

static void execution_allocates_nothing(void **state) {
  (void)state;
  static const int64_t lengths[] = {1, 3, 50};
  for (int i = 0; i < 3; ++i) {
    make_line(&first, ATTN_DECAY_CHANNEL, ATTN_UPDATE_DELTA, true, 18);
    first.problem.length = lengths[i];
    attn_plan *plan = line_plan(ATTN_PASS_FORWARD);
    void *workspace = make_workspace(plan);
    attn_recurrent_args args = line_args(&first);
    uint64_t before = attn_memory_get_stats().allocations;
    assert_ok(attn_recurrent_forward(plan, &args, workspace));
    assert_int_equal(attn_memory_get_stats().allocations, before);
    attn_free(workspace);
    attn_plan_destroy(plan);
  }
}

static void same_bits_every_time(void **state) {
  (void)state;
  make_line(&first, ATTN_DECAY_CHANNEL, ATTN_UPDATE_DELTA, true, 19);
  make_line(&second, ATTN_DECAY_CHANNEL, ATTN_UPDATE_DELTA, true, 19);
  run_line(&first);
  run_line(&second);
  assert_memory_equal(&first, &second, sizeof first);
}

static void plan_reports_its_work(void **state) {
  (void)state;
  attn_plan_info small, large;
  make_line(&first, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, false, 20);
  attn_plan *plan = line_plan(ATTN_PASS_FORWARD);
  assert_ok(attn_plan_get_info(plan, &small));
  attn_plan_destroy(plan);
  assert_true(small.flops == 6.0 * 50 * HEADS * 20 * 24);
  assert_non_null(strstr(small.description, "decay per token"));
  first.problem.length = 1 << 20; /* forward memory does not grow, backward as its square root */
  plan = line_plan(ATTN_PASS_FORWARD);
  assert_ok(attn_plan_get_info(plan, &large));
  attn_plan_destroy(plan);
  assert_true(large.workspace_bytes < 2 * small.workspace_bytes);
  plan = line_plan(ATTN_PASS_BACKWARD);
  assert_ok(attn_plan_get_info(plan, &large));
  attn_plan_destroy(plan);
  assert_true(large.workspace_bytes < (size_t)64 << 20);
}

static void measuring_finds_a_block_and_remembers_it(void **state) {
  (void)state;
  attn_plan_info measured, remembered;
  char file[] = "/tmp/attn-wisdom-XXXXXX";
  int handle = mkstemp(file);
  assert_true(handle >= 0);
  close(handle);
  assert_int_equal(setenv("ATTN_WISDOM", file, 1), 0);
  attn_wisdom_reload();
  make_line(&first, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, false, 21);
  first.problem.planning = ATTN_PLAN_MEASURE;
  attn_plan *plan = line_plan(ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD);
  assert_ok(attn_plan_get_info(plan, &measured));
  attn_plan_destroy(plan);
  first.problem.planning = ATTN_PLAN_ESTIMATE; /* uses what was found */
  plan = line_plan(ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD);
  assert_ok(attn_plan_get_info(plan, &remembered));
  attn_plan_destroy(plan);
  assert_string_equal(measured.description, remembered.description);
  unlink(file);
  unsetenv("ATTN_WISDOM");
  attn_wisdom_reload();
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(random_problems_match_oracle),
      cmocka_unit_test(threads_and_slices_change_nothing),
      cmocka_unit_test(result_is_independent_of_block),
      cmocka_unit_test(splitting_anywhere_is_the_same),
      cmocka_unit_test(stepping_equals_prefill),
      cmocka_unit_test(lightning_equals_quadratic_form),
      cmocka_unit_test(no_memory_when_the_decay_vanishes),
      cmocka_unit_test(zero_log_decay_is_no_decay),
      cmocka_unit_test(equal_channels_are_one_decay_a_token),
      cmocka_unit_test(key_slices_add_up),
      cmocka_unit_test(no_writing_leaves_only_decay),
      cmocka_unit_test(delta_rule_writes_perfectly),
      cmocka_unit_test(orthonormal_keys_make_delta_additive),
      cmocka_unit_test(delta_state_does_not_grow),
      cmocka_unit_test(ragged_equals_separate),
      cmocka_unit_test(gradients_equal_finite_differences),
      cmocka_unit_test(bad_problems_are_refused),
      cmocka_unit_test(bad_arguments_are_refused),
      cmocka_unit_test(bad_offsets_are_refused),
      cmocka_unit_test(execution_allocates_nothing),
      cmocka_unit_test(same_bits_every_time),
      cmocka_unit_test(plan_reports_its_work),
      cmocka_unit_test(measuring_finds_a_block_and_remembers_it),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
