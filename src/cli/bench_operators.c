/* What attn bench measures: the engines as each mixer uses them. */
#include "cli/bench.h"
#include "tensor/device.h"
#include "base/memory.h"
#include "base/random.h"

#include <math.h>
#include <string.h>

const attn_bench_operator attn_bench_operators[] = {
    {"softmax", .groups = true},
    {"lightning", .recurrent = true, .decay = ATTN_DECAY_HEAD, .update = ATTN_UPDATE_ADDITIVE},
    {"gla", .recurrent = true, .decay = ATTN_DECAY_CHANNEL, .update = ATTN_UPDATE_ADDITIVE},
    {"delta_net", .recurrent = true, .decay = ATTN_DECAY_NONE, .update = ATTN_UPDATE_DELTA},
    {"gated_delta_net", .recurrent = true, .decay = ATTN_DECAY_TOKEN, .update = ATTN_UPDATE_DELTA},
    {"kda", .recurrent = true, .decay = ATTN_DECAY_CHANNEL, .update = ATTN_UPDATE_DELTA},
    {"minimax", .recurrent = true, .layer = true},
    {"hedgehog", .recurrent = true, .layer = true},
    {"norm_attention", .recurrent = true, .layer = true},
    {"diag_attention", .recurrent = true, .layer = true, .groups = true},
    {"aaren", .recurrent = true, .layer = true},
    {"based", .recurrent = true, .layer = true},
    {"lawcat", .recurrent = true, .layer = true, .groups = true},
    {"lolcats", .recurrent = true, .layer = true, .groups = true},
};
const int attn_bench_layer_count = ATTN_COUNT(attn_bench_operators);
const int attn_bench_operator_count = 6; /* that are not `layer` */

const char *const attn_bench_passes[] = {"forward", "backward", "step", NULL};

/* Tensors ---------------------------------------------------------------------------------------
 */

typedef enum extent { NO_AXIS = 0, BATCH, QUERIES, KEYS, HEADS, KV_HEADS, DIM } extent;

typedef struct role_shape {
  bool real; /* float32, or float64 for float64: gates, sums and states */
  extent axes[4];
} role_shape;

/* d_x has the shape of x. */
static const role_shape shapes[ROLES] = {
    [ROLE_Q] = {false, {BATCH, QUERIES, HEADS, DIM}},
    [ROLE_K] = {false, {BATCH, KEYS, KV_HEADS, DIM}},
    [ROLE_V] = {false, {BATCH, KEYS, KV_HEADS, DIM}},
    [ROLE_O] = {false, {BATCH, QUERIES, HEADS, DIM}},
    [ROLE_LSE] = {true, {BATCH, HEADS, QUERIES}},
    [ROLE_DECAY] = {true, {BATCH, QUERIES, HEADS, DIM}},
    [ROLE_BETA] = {true, {BATCH, QUERIES, HEADS}},
    [ROLE_STATE] = {true, {BATCH, HEADS, DIM, DIM}},
    [ROLE_FINAL] = {true, {BATCH, HEADS, DIM, DIM}},
};

static const role_shape decay_shapes[] = {
    [ATTN_DECAY_NONE] = {true, {NO_AXIS}},
    [ATTN_DECAY_HEAD] = {true, {HEADS}},
    [ATTN_DECAY_TOKEN] = {true, {BATCH, QUERIES, HEADS}},
    [ATTN_DECAY_CHANNEL] = {true, {BATCH, QUERIES, HEADS, DIM}},
};

static const attn_bench_role gradient_of[ROLES] = {
    [ROLE_D_O] = ROLE_O, [ROLE_D_Q] = ROLE_Q,         [ROLE_D_K] = ROLE_K,
    [ROLE_D_V] = ROLE_V, [ROLE_D_DECAY] = ROLE_DECAY, [ROLE_D_BETA] = ROLE_BETA,
};

static const role_shape *shape_of(const attn_bench_case *c, attn_bench_role role) {
  if (role >= ROLE_D_O) role = gradient_of[role];
  return role == ROLE_DECAY ? &decay_shapes[c->op->decay] : &shapes[role];
}

static bool has_role(const attn_bench_case *c, attn_bench_role role) {
  bool recurrent = c->op->recurrent, backward = c->pass == ATTN_BENCH_BACKWARD;
  switch (role) {
  case ROLE_O: return !(recurrent && backward);
  case ROLE_LSE: return !recurrent && backward;
  case ROLE_DECAY: return recurrent && c->op->decay != ATTN_DECAY_NONE;
  case ROLE_BETA: return recurrent && c->op->update == ATTN_UPDATE_DELTA;
  case ROLE_STATE:
  case ROLE_FINAL: return recurrent && c->pass == ATTN_BENCH_STEP;
  case ROLE_D_DECAY: return recurrent && backward && c->op->decay > ATTN_DECAY_HEAD;
  case ROLE_D_BETA: return recurrent && backward && c->op->update == ATTN_UPDATE_DELTA;
  case ROLE_D_O:
  case ROLE_D_Q:
  case ROLE_D_K:
  case ROLE_D_V: return backward;
  default: return true;
  }
}

static int64_t extent_of(const attn_bench_case *c, extent axis) {
  bool step = c->pass == ATTN_BENCH_STEP;
  switch (axis) {
  case BATCH: return c->batch;
  case QUERIES: return step ? 1 : c->length;
  case KEYS: return step && c->op->recurrent ? 1 : c->length;
  case HEADS: return c->heads;
  case KV_HEADS: return c->op->recurrent ? c->heads : c->kv_heads;
  case DIM: return c->dim;
  default: return 0;
  }
}

static int get_shape(const attn_bench_case *c, attn_bench_role role, int64_t shape[4]) {
  const role_shape *s = shape_of(c, role);
  int rank = 0;
  if (!has_role(c, role)) return 0;
  for (; rank < 4 && s->axes[rank] != NO_AXIS; ++rank) shape[rank] = extent_of(c, s->axes[rank]);
  return rank;
}

static attn_dtype dtype_of(const attn_bench_case *c, attn_bench_role role) {
  if (!shape_of(c, role)->real) return c->dtype;
  return c->dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
}

bool attn_bench_is_output(const attn_bench_case *c, attn_bench_role role) {
  if (!has_role(c, role)) return false;
  if (c->pass == ATTN_BENCH_BACKWARD) return role > ROLE_D_O;
  return role == ROLE_O || role == ROLE_FINAL;
}

attn_status attn_bench_set_create(const attn_bench_case *c, attn_bench_set *set) {
  memset(set, 0, sizeof *set);
  for (int role = 0; role < ROLES; ++role) {
    int64_t shape[4];
    int rank = get_shape(c, (attn_bench_role)role, shape);
    if (!rank) continue;
    attn_status status = attn_tensor_create_on(c->device, dtype_of(c, (attn_bench_role)role), rank,
                                               shape, &set->tensor[role]);
    if (status != ATTN_OK) {
      set->tensor[role].data = NULL;
      attn_bench_set_destroy(set);
      return status;
    }
  }
  return ATTN_OK;
}

void attn_bench_set_destroy(attn_bench_set *set) {
  for (int role = 0; role < ROLES; ++role)
    if (set->tensor[role].data) attn_tensor_destroy(&set->tensor[role]);
  memset(set, 0, sizeof *set);
}

int64_t attn_bench_set_bytes(const attn_bench_case *c) {
  int64_t bytes = 0;
  for (int role = 0; role < ROLES; ++role) {
    int64_t shape[4], count = 1;
    int rank = get_shape(c, (attn_bench_role)role, shape);
    for (int axis = 0; axis < rank; ++axis) count *= shape[axis];
    if (rank) bytes += count * (int64_t)attn_dtype_size(dtype_of(c, (attn_bench_role)role));
  }
  return bytes;
}

/* Inputs ----------------------------------------------------------------------------------------
 */

typedef struct range {
  double low, high;
} range;

static range range_of(const attn_bench_case *c, attn_bench_role role) {
  const double unit = sqrt(3);              /* variance 1 */
  double key = unit / sqrt((double)c->dim); /* vectors of about length 1 */
  switch (role) {
  case ROLE_Q:
  case ROLE_K: return c->op->recurrent ? (range){-key, key} : (range){-unit, unit};
  case ROLE_DECAY: return (range){-0.2, 0};
  case ROLE_BETA: return (range){0, 1};
  default: return (range){-1, 1};
  }
}

/* Numbers repeat after PERIOD of them: making them must not take longer than what is timed. */
enum { PERIOD = 1000003 };

attn_status attn_bench_fill_one(const attn_bench_case *c, attn_bench_set *set, attn_bench_role role,
                                uint64_t seed) {
  attn_tensor *target = &set->tensor[role], here = *target, *t = &here;
  bool away = attn_is_cuda(target->device);
  if (away) ATTN_TRY(attn_tensor_create(target->dtype, target->rank, target->shape, &here));
  attn_random random = {.seed = seed, .stream = (uint64_t)role};
  range r = range_of(c, role);
  int64_t count = attn_tensor_count(t), fresh = count < PERIOD ? count : PERIOD;
  double *numbers = attn_alloc_array((size_t)fresh, sizeof *numbers);
  attn_tensor from, to;
  if (!numbers) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < fresh; ++i)
    numbers[i] = r.low + (r.high - r.low) * attn_random_uniform(&random);
  attn_status status = attn_tensor_wrap(numbers, ATTN_F64, 1, &fresh, &from);
  if (status == ATTN_OK) status = attn_tensor_wrap(t->data, t->dtype, 1, &fresh, &to);
  if (status == ATTN_OK) status = attn_tensor_copy(&from, &to);
  attn_free(numbers);
  size_t size = attn_dtype_size(t->dtype);
  for (int64_t done = fresh; status == ATTN_OK && done < count; done += fresh) {
    int64_t more = count - done < fresh ? count - done : fresh;
    memcpy((char *)t->data + (size_t)done * size, t->data, (size_t)more * size);
  }
  if (!away) return status;
  if (status == ATTN_OK) status = attn_tensor_copy(&here, target);
  attn_tensor_destroy(&here);
  return status;
}

attn_status attn_bench_fill(const attn_bench_case *c, attn_bench_set *set, uint64_t seed) {
  for (int role = 0; role < ROLES; ++role) {
    attn_bench_role r = (attn_bench_role)role;
    if (set->tensor[role].data && !attn_bench_is_output(c, r))
      ATTN_TRY(attn_bench_fill_one(c, set, r, seed));
  }
  return ATTN_OK;
}

/* Plans -----------------------------------------------------------------------------------------
 */

static attn_status plan_softmax(const attn_bench_case *c, int passes, attn_plan **plan) {
  attn_softmax_problem p = ATTN_SOFTMAX_PROBLEM_INIT;
  p.dtype = c->dtype;
  p.passes = passes;
  p.batch = c->batch;
  p.query_length = extent_of(c, QUERIES);
  p.key_length = extent_of(c, KEYS);
  p.heads = c->heads;
  p.kv_heads = c->kv_heads;
  p.dim = p.value_dim = c->dim;
  p.causal = true;
  p.device = c->device;
  p.planning = c->planning;
  return attn_softmax_plan(&p, plan);
}

static attn_status plan_recurrent(const attn_bench_case *c, int passes, attn_plan **plan) {
  attn_recurrent_problem p = ATTN_RECURRENT_PROBLEM_INIT;
  p.dtype = c->dtype;
  p.passes = passes;
  p.batch = c->batch;
  p.length = extent_of(c, QUERIES);
  p.heads = p.value_heads = c->heads;
  p.dim = p.value_dim = c->dim;
  p.decay = c->op->decay;
  p.update = c->op->update;
  p.device = c->device;
  p.planning = c->planning;
  return attn_recurrent_plan(&p, plan);
}

static attn_status make_plan(const attn_bench_case *c, int passes, attn_plan **plan) {
  return c->op->recurrent ? plan_recurrent(c, passes, plan) : plan_softmax(c, passes, plan);
}

static attn_status make_plans(const attn_bench_case *c, attn_bench_ready *ready) {
  bool backward = c->pass == ATTN_BENCH_BACKWARD;
  attn_plan_info forward = {0};
  ATTN_TRY(make_plan(c, backward ? ATTN_PASS_BACKWARD : ATTN_PASS_FORWARD, &ready->plan));
  ATTN_TRY(attn_plan_get_info(ready->plan, &ready->info));
  if (backward && !c->op->recurrent) {
    ATTN_TRY(make_plan(c, ATTN_PASS_FORWARD, &ready->forward));
    ATTN_TRY(attn_plan_get_info(ready->forward, &forward));
  }
  ready->workspace_bytes = ready->info.workspace_bytes > forward.workspace_bytes
                               ? ready->info.workspace_bytes
                               : forward.workspace_bytes;
  ready->device = c->device;
  ready->workspace = attn_device_alloc(c->device, ready->workspace_bytes);
  return ready->workspace ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

attn_status attn_bench_prepare(const attn_bench_case *c, attn_bench_ready *ready) {
  memset(ready, 0, sizeof *ready);
  attn_status status = make_plans(c, ready);
  if (status != ATTN_OK) attn_bench_dispose(ready);
  return status;
}

void attn_bench_dispose(attn_bench_ready *ready) {
  attn_plan_destroy(ready->plan);
  attn_plan_destroy(ready->forward);
  attn_device_free(ready->device, ready->workspace);
  memset(ready, 0, sizeof *ready);
}

/* Execution -------------------------------------------------------------------------------------
 */

static attn_softmax_args softmax_args(const attn_bench_set *s) {
  return (attn_softmax_args){
      .q = s->tensor[ROLE_Q],
      .k = s->tensor[ROLE_K],
      .v = s->tensor[ROLE_V],
      .o = s->tensor[ROLE_O],
      .lse = s->tensor[ROLE_LSE],
      .d_o = s->tensor[ROLE_D_O],
      .d_q = s->tensor[ROLE_D_Q],
      .d_k = s->tensor[ROLE_D_K],
      .d_v = s->tensor[ROLE_D_V],
  };
}

static attn_recurrent_args recurrent_args(const attn_bench_set *s) {
  return (attn_recurrent_args){
      .q = s->tensor[ROLE_Q],
      .k = s->tensor[ROLE_K],
      .v = s->tensor[ROLE_V],
      .o = s->tensor[ROLE_O],
      .decay = s->tensor[ROLE_DECAY],
      .beta = s->tensor[ROLE_BETA],
      .initial_state = s->tensor[ROLE_STATE],
      .final_state = s->tensor[ROLE_FINAL],
      .d_o = s->tensor[ROLE_D_O],
      .d_q = s->tensor[ROLE_D_Q],
      .d_k = s->tensor[ROLE_D_K],
      .d_v = s->tensor[ROLE_D_V],
      .d_decay = s->tensor[ROLE_D_DECAY],
      .d_beta = s->tensor[ROLE_D_BETA],
  };
}

attn_status attn_bench_run_before(const attn_bench_case *c, const attn_bench_ready *ready,
                                  attn_bench_set *set) {
  (void)c;
  if (!ready->forward) return ATTN_OK;
  attn_softmax_args args = softmax_args(set);
  return attn_softmax_forward(ready->forward, &args, ready->workspace);
}

attn_status attn_bench_run(const attn_bench_case *c, const attn_bench_ready *ready,
                           attn_bench_set *set, bool in_place) {
  bool backward = c->pass == ATTN_BENCH_BACKWARD;
  if (!c->op->recurrent) {
    attn_softmax_args args = softmax_args(set);
    return backward ? attn_softmax_backward(ready->plan, &args, ready->workspace)
                    : attn_softmax_forward(ready->plan, &args, ready->workspace);
  }
  attn_recurrent_args args = recurrent_args(set);
  if (in_place) args.final_state = args.initial_state;
  return backward ? attn_recurrent_backward(ready->plan, &args, ready->workspace)
                  : attn_recurrent_forward(ready->plan, &args, ready->workspace);
}
