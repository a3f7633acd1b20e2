/* The recurrent engine against its token-by-token oracle, over pseudo-random problems; its
 * identities (catalogue entries Lightning Attention-2 and Kimi Linear); and its refusals. */
#include "support/test.h"

#include "attn/recurrent.h"
#include "base/memory.h"
#include "base/random.h"
#include "oracles/recurrent.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

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

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(random_problems_match_oracle),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
