/* Checking and timing one row.
 *
 * The check uses the plan that is timed. Attention is causal, so the first tokens of a long result
 * depend on the first tokens of the inputs alone: they are compared with the float64 engine on
 * generic kernels at that short length. For the backward pass the gradient of all later outputs is
 * set to zero while it is checked, which confines it in the same way. */
#include "cli/bench.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "tensor/device.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

enum {
  CHECKED_TOKENS = 128,
  CHECKED_KEYS = 1 << 17, /* of a softmax step: beyond, float64 copies of them would be too large */
  MOST_SETS = 1024,
};

/* Norm of the error over the norm of the result. bfloat16: unit roundoff 2^-9 in each operand and
 * in what is kept between products, some ten roundings; twice as many on the way of a gradient.
 * float32: 2^-24 over sums of some hundred terms, and the exponential's error. The delta rule adds
 * a block's writes although later ones erase earlier ones, at DELTA times the rounding. */
static const double tolerance[ATTN_DTYPE_COUNT] = {
    [ATTN_F64] = 1e-11, [ATTN_F32] = 1e-5, [ATTN_BF16] = 0.0125};
static const double backward_factor = 2, delta_factor = 3;

static double allowed_error(const attn_bench_case *c) {
  return tolerance[c->dtype] * (c->pass == ATTN_BENCH_BACKWARD ? backward_factor : 1) *
         (c->op->recurrent && c->op->update == ATTN_UPDATE_DELTA ? delta_factor : 1);
}

static attn_status wrong(const attn_bench_case *c, const char *what) {
  return attn_fail(ATTN_INTERNAL, "%s %s %s at length %lld gives a wrong result: %s", c->op->name,
                   attn_bench_passes[c->pass], attn_dtype_name(c->dtype), (long long)c->length,
                   what);
}

/* The small case in float64 -------------------------------------------------------------------*/

static attn_bench_case small_case(const attn_bench_case *c) {
  attn_bench_case s = *c;
  s.dtype = ATTN_F64;
  s.device = (attn_device){0};
  s.planning = ATTN_PLAN_ESTIMATE;
  s.batch = 1;
  if (c->pass == ATTN_BENCH_STEP) {
    s.heads = c->op->recurrent ? 1 : c->heads / c->kv_heads; /* those of the first key head */
    s.kv_heads = 1;
  } else if (s.length > CHECKED_TOKENS) {
    s.length = CHECKED_TOKENS;
  }
  return s;
}

/* The part of a tensor that the small case has: its first elements along every axis. */
static attn_status corner(const attn_tensor *whole, const attn_tensor *small, attn_tensor *part) {
  *part = *whole;
  for (int axis = 0; axis < small->rank; ++axis)
    ATTN_TRY(attn_tensor_slice(part, axis, 0, small->shape[axis], part));
  return ATTN_OK;
}

static attn_status run_small(const attn_bench_case *small, attn_bench_set *set) {
  attn_bench_ready ready;
  attn_kernel_path path = attn_get_kernel_path();
  ATTN_TRY(attn_set_kernel_path(ATTN_PATH_GENERIC));
  attn_status status = attn_bench_prepare(small, &ready);
  attn_set_kernel_path(path);
  ATTN_TRY(status);
  status = attn_bench_run_before(small, &ready, set);
  if (status == ATTN_OK) status = attn_bench_run(small, &ready, set, false);
  attn_bench_dispose(&ready);
  return status;
}

static attn_status compare_one(const attn_tensor *part, const attn_tensor *expected,
                               double *error) {
  attn_tensor got;
  ATTN_TRY(attn_tensor_create(ATTN_F64, expected->rank, expected->shape, &got));
  attn_status status = attn_tensor_copy(part, &got);
  const double *a = got.data, *b = expected->data;
  double difference = 0, norm = 0;
  for (int64_t i = 0; status == ATTN_OK && i < attn_tensor_count(&got); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  attn_tensor_destroy(&got);
  if (norm > 0) *error = fmax(*error, sqrt(difference / norm));
  return status;
}

static attn_status compare_small(const attn_bench_case *c, const attn_bench_set *set,
                                 const attn_bench_case *small, attn_bench_set *expected,
                                 double *error) {
  attn_tensor part;
  for (int i = 0; i < ROLES; ++i) {
    attn_bench_role role = (attn_bench_role)i;
    if (!expected->tensor[i].data || attn_bench_is_output(c, role)) continue;
    if (role == ROLE_LSE || (role == ROLE_O && c->pass == ATTN_BENCH_BACKWARD)) continue;
    ATTN_TRY(corner(&set->tensor[i], &expected->tensor[i], &part));
    ATTN_TRY(attn_tensor_copy(&part, &expected->tensor[i]));
  }
  ATTN_TRY(run_small(small, expected));
  for (int i = 0; i < ROLES; ++i) {
    if (!attn_bench_is_output(c, (attn_bench_role)i)) continue;
    ATTN_TRY(corner(&set->tensor[i], &expected->tensor[i], &part));
    ATTN_TRY(compare_one(&part, &expected->tensor[i], error));
  }
  return ATTN_OK;
}

static attn_status compare(const attn_bench_case *c, const attn_bench_set *set, double *error) {
  attn_bench_case small = small_case(c);
  attn_bench_set expected;
  char text[64];
  *error = 0;
  ATTN_TRY(attn_bench_set_create(&small, &expected));
  attn_status status = compare_small(c, set, &small, &expected, error);
  attn_bench_set_destroy(&expected);
  ATTN_TRY(status);
  if (*error <= allowed_error(c)) return ATTN_OK;
  snprintf(text, sizeof text, "its error is %.3g, expected at most %.3g", *error, allowed_error(c));
  return wrong(c, text);
}

/* The check -----------------------------------------------------------------------------------*/

static bool all_finite(const attn_tensor *whole) {
  const attn_tensor *t = whole;
  if (attn_is_cuda(whole->device)) {
    attn_tensor here;
    if (attn_tensor_create(whole->dtype, whole->rank, whole->shape, &here) != ATTN_OK) return false;
    bool finite = attn_tensor_copy(whole, &here) == ATTN_OK && all_finite(&here);
    attn_tensor_destroy(&here);
    return finite;
  }
  int64_t count = attn_tensor_count(t);
  if (t->dtype == ATTN_BF16) { /* exponent all ones: infinite or NaN */
    const uint16_t *x = t->data;
    for (int64_t i = 0; i < count; ++i)
      if ((x[i] & 0x7f80) == 0x7f80) return false;
  } else if (t->dtype == ATTN_F32) {
    const float *x = t->data;
    for (int64_t i = 0; i < count; ++i)
      if (!isfinite(x[i])) return false;
  } else {
    const double *x = t->data;
    for (int64_t i = 0; i < count; ++i)
      if (!isfinite(x[i])) return false;
  }
  return true;
}

/* Zeroes the gradient of all outputs but the first ones. */
static attn_status confine(const attn_bench_case *c, attn_bench_set *set) {
  attn_tensor later;
  if (c->length <= CHECKED_TOKENS) return ATTN_OK;
  ATTN_TRY(attn_tensor_slice(&set->tensor[ROLE_D_O], 1, CHECKED_TOKENS, c->length - CHECKED_TOKENS,
                             &later));
  return attn_tensor_fill(&later, 0);
}

static attn_status check(const attn_bench_case *c, const attn_bench_ready *ready,
                         attn_bench_set *set, double *error) {
  bool backward = c->pass == ATTN_BENCH_BACKWARD;
  ATTN_TRY(attn_bench_run_before(c, ready, set));
  if (backward) ATTN_TRY(confine(c, set));
  for (int role = 0; role < ROLES; ++role)
    if (attn_bench_is_output(c, (attn_bench_role)role))
      ATTN_TRY(attn_tensor_fill(&set->tensor[role], NAN));
  ATTN_TRY(attn_bench_run(c, ready, set, false));
  for (int role = 0; role < ROLES; ++role)
    if (attn_bench_is_output(c, (attn_bench_role)role) && !all_finite(&set->tensor[role]))
      return wrong(c, "not all of it is finite");
  if (c->pass == ATTN_BENCH_STEP && !c->op->recurrent && c->length > CHECKED_KEYS) return ATTN_OK;
  return compare(c, set, error);
}

/* A softmax step over more keys than float64 has room for is compared at fewer. */
static attn_status check_fewer(const attn_bench_case *c, double *error) {
  attn_bench_case fewer = *c;
  attn_bench_ready ready;
  attn_bench_set set;
  fewer.length = CHECKED_KEYS;
  ATTN_TRY(attn_bench_prepare(&fewer, &ready));
  attn_status status = attn_bench_set_create(&fewer, &set);
  if (status == ATTN_OK) {
    status = attn_bench_fill(&fewer, &set, 1);
    if (status == ATTN_OK) status = check(&fewer, &ready, &set, error);
    attn_bench_set_destroy(&set);
  }
  attn_bench_dispose(&ready);
  return status;
}

/* Timing --------------------------------------------------------------------------------------*/

/* Sets of tensors to rotate among, so that no execution finds its inputs in a cache: together
 * larger than the last cache, as far as an eighth of the free memory allows. */
static int64_t choose_sets(const attn_bench_case *c) {
  double each = (double)attn_bench_set_bytes(c), wanted = 1.25 * (double)attn_cpu_get()->l3_bytes;
  double room = (double)sysconf(_SC_AVPHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / 8;
  const attn_gpu *gpu = attn_is_cuda(c->device) ? attn_gpu_open(c->device.index) : NULL;
  if (gpu) wanted = 2 * (double)gpu->device.l2_bytes;
  if (gpu) room = (double)gpu->device.memory_bytes / 8;
  double count = ceil(fmin(wanted, room) / fmax(each, 1));
  return count < 1 ? 1 : count > MOST_SETS ? MOST_SETS : (int64_t)count;
}

static attn_status copy_set(const attn_bench_set *from, attn_bench_set *to) {
  for (int role = 0; role < ROLES; ++role)
    if (from->tensor[role].data) ATTN_TRY(attn_tensor_copy(&from->tensor[role], &to->tensor[role]));
  return ATTN_OK;
}

/* Executions to be timed as one: on a GPU they are queued, and waiting for each would be timed too.
 */
static attn_status choose_together(const attn_bench_case *c, const attn_bench_ready *ready,
                                   attn_bench_set *sets, int64_t count, int64_t *together) {
  const int tried = 3;
  *together = 1;
  if (!attn_is_cuda(c->device)) return ATTN_OK;
  ATTN_TRY(attn_bench_run(c, ready, &sets[0], true));
  ATTN_TRY(attn_device_synchronize(c->device));
  double start = attn_now();
  for (int i = 0; i < tried; ++i) ATTN_TRY(attn_bench_run(c, ready, &sets[i % count], true));
  ATTN_TRY(attn_device_synchronize(c->device));
  *together = attn_bench_gpu_repeats((attn_now() - start) / tried);
  return ATTN_OK;
}

static attn_status time_runs(const attn_bench_case *c, const attn_bench_ready *ready,
                             attn_bench_set *sets, int64_t count, const attn_bench_effort *effort,
                             attn_bench_row *row) {
  attn_bench_timer timer = {.seconds = effort->seconds, .quiet = effort->quiet};
  size_t before = attn_device_live_bytes(c->device);
  attn_device_reset_peak(c->device);
  int64_t together;
  ATTN_TRY(choose_together(c, ready, sets, count, &together));
  /* the first set was warmed by the check: begin with the next */
  for (int64_t n = 1; attn_bench_timer_begin(&timer);) {
    for (int64_t i = 0; i < together; ++i, ++n)
      ATTN_TRY(attn_bench_run(c, ready, &sets[n % count], true));
    ATTN_TRY(attn_device_synchronize(c->device));
    attn_bench_timer_end(&timer);
  }
  row->extra = (double)(ready->workspace_bytes + attn_device_peak_bytes(c->device) - before);
  ATTN_TRY(attn_bench_timer_result(&timer, row));
  row->seconds /= (double)together;
  return ATTN_OK;
}

static attn_status prepare_sets(const attn_bench_case *c, const attn_bench_ready *ready,
                                attn_bench_set *sets, int64_t count, double *error) {
  ATTN_TRY(attn_bench_fill(c, &sets[0], (uint64_t)c->length));
  ATTN_TRY(check(c, ready, &sets[0], error));
  if (sets[0].tensor[ROLE_D_O].data)
    ATTN_TRY(attn_bench_fill_one(c, &sets[0], ROLE_D_O, (uint64_t)c->length));
  for (int64_t i = 1; i < count; ++i) ATTN_TRY(copy_set(&sets[0], &sets[i]));
  return ATTN_OK;
}

static attn_status measure_on(const attn_bench_case *c, const attn_bench_ready *ready,
                              const attn_bench_effort *effort, attn_bench_row *row) {
  int64_t count = choose_sets(c);
  attn_bench_set *sets = attn_alloc_array((size_t)count, sizeof *sets);
  attn_status status = sets ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count && status == ATTN_OK; ++i)
    status = attn_bench_set_create(c, &sets[i]);
  if (status == ATTN_OK) status = prepare_sets(c, ready, sets, count, &row->error);
  if (status == ATTN_OK) status = time_runs(c, ready, sets, count, effort, row);
  for (int64_t i = 0; sets && i < count; ++i) attn_bench_set_destroy(&sets[i]);
  attn_free(sets);
  return status;
}

/* bfloat16 may be computed in float32 where that is faster. */
static double peak_of(const attn_bench_limits *limits, attn_dtype dtype) {
  return dtype == ATTN_BF16  ? fmax(limits->bf16_flops, limits->f32_flops)
         : dtype == ATTN_F32 ? limits->f32_flops
                             : NAN;
}

void attn_bench_rate(attn_bench_row *row, const attn_bench_limits *limits) {
  const attn_bench_case *c = &row->c;
  double tokens = (double)c->batch * (c->pass == ATTN_BENCH_STEP ? 1 : (double)c->length);
  row->tokens = tokens / row->seconds;
  row->peak = peak_of(limits, c->dtype);
  row->of_peak = row->flops / row->seconds / row->peak;
  row->of_copy = row->bytes / row->seconds / limits->copy_bytes;
}

attn_status attn_bench_measure(const attn_bench_case *c, const attn_bench_limits *limits,
                               const attn_bench_effort *effort, attn_bench_row *row) {
  attn_bench_ready ready;
  *row = (attn_bench_row){.c = *c};
  ATTN_TRY(attn_bench_prepare(c, &ready));
  attn_status status = ATTN_OK;
  if (c->pass == ATTN_BENCH_STEP && !c->op->recurrent && c->length > CHECKED_KEYS)
    status = check_fewer(c, &row->error);
  if (status == ATTN_OK) {
    double error = row->error;
    status = measure_on(c, &ready, effort, row);
    row->error = fmax(row->error, error);
  }
  row->flops = ready.info.flops;
  row->bytes = ready.info.bytes;
  attn_bench_rate(row, limits);
  snprintf(row->plan, sizeof row->plan, "%s", ready.info.description);
  attn_bench_dispose(&ready);
  return status;
}
