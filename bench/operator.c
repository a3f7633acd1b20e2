/* An operator on given tensors, forward and backward, so that its results can be compared with
 * those of others on the same numbers (bench/peers/errors_beside_peers.py):
 *
 *   bench_operator IN.safetensors OUT.safetensors
 *                  --operator softmax|lightning|gla|delta_net|gated_delta_net|kda
 *                  [--causal] [--scale S] [--device cpu|cuda|cuda:N]
 *
 * IN has q, k, v and d_o, all of one dtype and [batch, length, heads, dim]; recurrences but
 * DeltaNet also have their log decays, decay (lightning: [heads]; gated_delta_net: [batch, length,
 * heads]; gla, kda: [batch, length, heads, dim]), the delta rule its beta [batch, length, heads],
 * float32 (float64 for float64). Queries and keys are taken as they are: the caller normalises
 * them. OUT gets o, lse (softmax: [batch, heads, length]), d_q, d_k, d_v, d_decay (but for
 * lightning) and d_beta. Without --scale it is 1 / sqrt(dim), for every operator. */
#include "attn/attn.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "files/safetensors.h"
#include "tensor/device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct mechanism {
  const char *name;
  bool recurrent; /* the recurrent engine, else softmax */
  attn_decay decay;
  attn_update update;
} mechanism;

static const mechanism mechanisms[] = {
    {"softmax", false, ATTN_DECAY_NONE, ATTN_UPDATE_ADDITIVE},
    {"lightning", true, ATTN_DECAY_HEAD, ATTN_UPDATE_ADDITIVE},
    {"gla", true, ATTN_DECAY_CHANNEL, ATTN_UPDATE_ADDITIVE},
    {"delta_net", true, ATTN_DECAY_NONE, ATTN_UPDATE_DELTA},
    {"gated_delta_net", true, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA},
    {"kda", true, ATTN_DECAY_CHANNEL, ATTN_UPDATE_DELTA},
};

/* Tensors: inputs, then outputs. */
typedef enum role {
  ROLE_Q = 0,
  ROLE_K,
  ROLE_V,
  ROLE_DECAY,
  ROLE_BETA,
  ROLE_D_O,
  ROLE_O,
  ROLE_LSE,
  ROLE_D_Q,
  ROLE_D_K,
  ROLE_D_V,
  ROLE_D_DECAY,
  ROLE_D_BETA,
  ROLES
} role;

enum { FIRST_OUTPUT = ROLE_O, RANK = 4 };

/* Key heads are the value heads in softmax and the query heads in recurrences; heads of o the other
 * way round. */
typedef enum extent {
  NO_AXIS = 0,
  BATCH,
  QUERIES,
  KEYS,
  HEADS,
  KEY_HEADS,
  VALUE_HEADS,
  OUTPUT_HEADS,
  DIM,
  VALUE_DIM,
  EXTENTS
} extent;

typedef struct form {
  const char *name;
  bool real; /* float32, or float64 for float64 */
  extent axes[RANK];
} form;

static const form forms[ROLES] = {
    [ROLE_Q] = {"q", false, {BATCH, QUERIES, HEADS, DIM}},
    [ROLE_K] = {"k", false, {BATCH, KEYS, KEY_HEADS, DIM}},
    [ROLE_V] = {"v", false, {BATCH, KEYS, VALUE_HEADS, VALUE_DIM}},
    [ROLE_DECAY] = {"decay", true, {NO_AXIS}}, /* decay_axes */
    [ROLE_BETA] = {"beta", true, {BATCH, QUERIES, VALUE_HEADS}},
    [ROLE_D_O] = {"d_o", false, {BATCH, QUERIES, OUTPUT_HEADS, VALUE_DIM}},
    [ROLE_O] = {"o", false, {BATCH, QUERIES, OUTPUT_HEADS, VALUE_DIM}},
    [ROLE_LSE] = {"lse", true, {BATCH, HEADS, QUERIES}},
    [ROLE_D_Q] = {"d_q", false, {BATCH, QUERIES, HEADS, DIM}},
    [ROLE_D_K] = {"d_k", false, {BATCH, KEYS, KEY_HEADS, DIM}},
    [ROLE_D_V] = {"d_v", false, {BATCH, KEYS, VALUE_HEADS, VALUE_DIM}},
    [ROLE_D_DECAY] = {"d_decay", true, {NO_AXIS}},
    [ROLE_D_BETA] = {"d_beta", true, {BATCH, QUERIES, VALUE_HEADS}},
};

static const extent decay_axes[][RANK] = {
    [ATTN_DECAY_NONE] = {NO_AXIS},
    [ATTN_DECAY_HEAD] = {VALUE_HEADS},
    [ATTN_DECAY_TOKEN] = {BATCH, QUERIES, VALUE_HEADS},
    [ATTN_DECAY_CHANNEL] = {BATCH, QUERIES, VALUE_HEADS, DIM},
};

typedef struct job {
  const char *in, *out;
  const mechanism *op;
  bool causal;
  double scale; /* 0: 1 / sqrt(dim) */
  attn_device device;
  attn_dtype dtype;
  int64_t extents[EXTENTS];
  attn_tensor tensor[ROLES]; /* on the device; data is NULL where the operator has none */
} job;

/* Tensors ---------------------------------------------------------------------------------------
 */

static bool has_role(const job *j, role r) {
  switch (r) {
  case ROLE_DECAY: return j->op->decay != ATTN_DECAY_NONE;
  case ROLE_D_DECAY: return j->op->decay > ATTN_DECAY_HEAD;
  case ROLE_BETA:
  case ROLE_D_BETA: return j->op->update == ATTN_UPDATE_DELTA;
  case ROLE_LSE: return !j->op->recurrent;
  default: return true;
  }
}

static attn_dtype dtype_of(const job *j, role r) {
  if (!forms[r].real) return j->dtype;
  return j->dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
}

static int shape_of(const job *j, role r, int64_t shape[RANK]) {
  bool decay = r == ROLE_DECAY || r == ROLE_D_DECAY;
  const extent *axes = decay ? decay_axes[j->op->decay] : forms[r].axes;
  int rank = 0;
  for (; rank < RANK && axes[rank] != NO_AXIS; ++rank) shape[rank] = j->extents[axes[rank]];
  return rank;
}

/* "bfloat16 [2, 5, 4, 64]"; the text is the caller's to free. */
static char *describe(attn_dtype dtype, int rank, const int64_t *shape) {
  attn_text text = {0};
  char *result;
  attn_text_print(&text, "%s [", attn_dtype_name(dtype));
  for (int i = 0; i < rank; ++i)
    attn_text_print(&text, "%s%lld", i ? ", " : "", (long long)shape[i]);
  attn_text_print(&text, "]");
  return attn_text_take(&text, &result) == ATTN_OK ? result : NULL;
}

static attn_status check(const job *j, role r, const attn_tensor *given) {
  int64_t shape[RANK];
  int rank = shape_of(j, r, shape);
  attn_dtype dtype = dtype_of(j, r);
  if (given->dtype == dtype && given->rank == rank &&
      memcmp(given->shape, shape, (size_t)rank * sizeof *shape) == 0)
    return ATTN_OK;
  char *is = describe(given->dtype, given->rank, given->shape);
  char *expected = describe(dtype, rank, shape);
  attn_status status = attn_fail(ATTN_INVALID_SHAPE, "%s is %s, expected %s", forms[r].name,
                                 is ? is : "?", expected ? expected : "?");
  attn_free(is);
  attn_free(expected);
  return status;
}

/* q and v tell all extents. */
static attn_status measure_extents(job *j, const attn_tensor *q, const attn_tensor *v) {
  const attn_tensor *both[] = {q, v};
  for (int i = 0; i < 2; ++i)
    if (both[i]->rank != RANK)
      return attn_fail(ATTN_INVALID_SHAPE,
                       "%s has %d axes, expected four: [batch, length, heads, dim]", i ? "v" : "q",
                       both[i]->rank);
  bool recurrent = j->op->recurrent;
  int64_t *e = j->extents;
  j->dtype = q->dtype;
  e[BATCH] = q->shape[0];
  e[QUERIES] = q->shape[1];
  e[KEYS] = recurrent ? q->shape[1] : v->shape[1];
  e[HEADS] = q->shape[2];
  e[VALUE_HEADS] = v->shape[2];
  e[KEY_HEADS] = recurrent ? e[HEADS] : e[VALUE_HEADS];
  e[OUTPUT_HEADS] = recurrent ? e[VALUE_HEADS] : e[HEADS];
  e[DIM] = q->shape[3];
  e[VALUE_DIM] = v->shape[3];
  return ATTN_OK;
}

static attn_status create(job *j, role r) {
  int64_t shape[RANK];
  int rank = shape_of(j, r, shape);
  attn_status status = attn_tensor_create_on(j->device, dtype_of(j, r), rank, shape, &j->tensor[r]);
  if (status != ATTN_OK) j->tensor[r].data = NULL;
  return status;
}

static attn_status take_inputs(job *j, const attn_safetensors *file) {
  attn_tensor given[FIRST_OUTPUT];
  for (int r = 0; r < FIRST_OUTPUT; ++r)
    if (has_role(j, (role)r)) ATTN_TRY(attn_safetensors_find(file, forms[r].name, &given[r]));
  ATTN_TRY(measure_extents(j, &given[ROLE_Q], &given[ROLE_V]));
  for (int r = 0; r < FIRST_OUTPUT; ++r) {
    if (!has_role(j, (role)r)) continue;
    ATTN_TRY(check(j, (role)r, &given[r]));
    ATTN_TRY(create(j, (role)r));
    ATTN_TRY(attn_tensor_copy(&given[r], &j->tensor[r]));
  }
  return ATTN_OK;
}

static attn_status read_inputs(job *j) {
  attn_safetensors *file;
  ATTN_TRY(attn_safetensors_open(j->in, &file));
  attn_status status = take_inputs(j, file);
  if (status != ATTN_OK) status = attn_fail_in(status, "%s", j->in);
  attn_safetensors_close(file);
  return status;
}

/* NaN, so that what is not written is seen. */
static attn_status make_outputs(job *j) {
  for (int r = FIRST_OUTPUT; r < ROLES; ++r) {
    if (!has_role(j, (role)r)) continue;
    ATTN_TRY(create(j, (role)r));
    ATTN_TRY(attn_tensor_fill(&j->tensor[r], NAN));
  }
  return ATTN_OK;
}

static void free_tensors(job *j) {
  for (int r = 0; r < ROLES; ++r)
    if (j->tensor[r].data) attn_tensor_destroy(&j->tensor[r]);
}

/* Brings the outputs to the processor; those up to *count are the caller's to destroy. */
static attn_status fetch_outputs(const job *j, attn_named_tensor *outputs, int64_t *count) {
  for (int r = FIRST_OUTPUT; r < ROLES; ++r) {
    const attn_tensor *away = &j->tensor[r];
    attn_named_tensor *here = &outputs[*count];
    if (!away->data) continue;
    here->name = forms[r].name;
    ATTN_TRY(attn_tensor_create(away->dtype, away->rank, away->shape, &here->tensor));
    ++*count;
    ATTN_TRY(attn_tensor_copy(away, &here->tensor));
  }
  return ATTN_OK;
}

static attn_status write_outputs(const job *j) {
  attn_named_tensor outputs[ROLES];
  int64_t count = 0;
  attn_status status = fetch_outputs(j, outputs, &count);
  if (status == ATTN_OK) status = attn_safetensors_write(j->out, outputs, count, NULL, 0);
  for (int64_t i = 0; i < count; ++i) attn_tensor_destroy(&outputs[i].tensor);
  return status;
}

/* Execution -------------------------------------------------------------------------------------
 */

static double scale_of(const job *j) {
  return j->scale != 0 ? j->scale : 1 / sqrt((double)j->extents[DIM]);
}

static attn_status plan_softmax(const job *j, attn_plan **plan) {
  attn_softmax_problem p = ATTN_SOFTMAX_PROBLEM_INIT;
  p.dtype = j->dtype;
  p.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
  p.batch = j->extents[BATCH];
  p.query_length = j->extents[QUERIES];
  p.key_length = j->extents[KEYS];
  p.heads = j->extents[HEADS];
  p.kv_heads = j->extents[KEY_HEADS];
  p.dim = j->extents[DIM];
  p.value_dim = j->extents[VALUE_DIM];
  p.scale = scale_of(j);
  p.causal = j->causal;
  p.device = j->device;
  return attn_softmax_plan(&p, plan);
}

static attn_status plan_recurrent(const job *j, attn_plan **plan) {
  attn_recurrent_problem p = ATTN_RECURRENT_PROBLEM_INIT;
  p.dtype = j->dtype;
  p.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
  p.batch = j->extents[BATCH];
  p.length = j->extents[QUERIES];
  p.heads = j->extents[HEADS];
  p.value_heads = j->extents[VALUE_HEADS];
  p.dim = j->extents[DIM];
  p.value_dim = j->extents[VALUE_DIM];
  p.scale = scale_of(j);
  p.decay = j->op->decay;
  p.update = j->op->update;
  p.device = j->device;
  return attn_recurrent_plan(&p, plan);
}

static attn_status execute_softmax(const job *j, const attn_plan *plan, void *workspace) {
  const attn_tensor *t = j->tensor;
  attn_softmax_args args = {.q = t[ROLE_Q],
                            .k = t[ROLE_K],
                            .v = t[ROLE_V],
                            .o = t[ROLE_O],
                            .lse = t[ROLE_LSE],
                            .d_o = t[ROLE_D_O],
                            .d_q = t[ROLE_D_Q],
                            .d_k = t[ROLE_D_K],
                            .d_v = t[ROLE_D_V]};
  ATTN_TRY(attn_softmax_forward(plan, &args, workspace));
  return attn_softmax_backward(plan, &args, workspace);
}

static attn_status execute_recurrent(const job *j, const attn_plan *plan, void *workspace) {
  const attn_tensor *t = j->tensor;
  attn_recurrent_args args = {.q = t[ROLE_Q],
                              .k = t[ROLE_K],
                              .v = t[ROLE_V],
                              .o = t[ROLE_O],
                              .decay = t[ROLE_DECAY],
                              .beta = t[ROLE_BETA],
                              .d_o = t[ROLE_D_O],
                              .d_q = t[ROLE_D_Q],
                              .d_k = t[ROLE_D_K],
                              .d_v = t[ROLE_D_V],
                              .d_decay = t[ROLE_D_DECAY],
                              .d_beta = t[ROLE_D_BETA]};
  ATTN_TRY(attn_recurrent_forward(plan, &args, workspace));
  return attn_recurrent_backward(plan, &args, workspace);
}

static attn_status execute(const job *j, const attn_plan *plan) {
  attn_plan_info info;
  ATTN_TRY(attn_plan_get_info(plan, &info));
  printf("%s\n", info.description);
  void *workspace = attn_device_alloc(j->device, info.workspace_bytes);
  if (!workspace) return ATTN_OUT_OF_MEMORY;
  attn_status status = j->op->recurrent ? execute_recurrent(j, plan, workspace)
                                        : execute_softmax(j, plan, workspace);
  if (status == ATTN_OK) status = attn_device_synchronize(j->device);
  attn_device_free(j->device, workspace);
  return status;
}

static attn_status run_operator(job *j) {
  attn_plan *plan;
  ATTN_TRY(make_outputs(j));
  ATTN_TRY(j->op->recurrent ? plan_recurrent(j, &plan) : plan_softmax(j, &plan));
  attn_status status = execute(j, plan);
  attn_plan_destroy(plan);
  return status;
}

static attn_status run(job *j) {
  attn_status status = read_inputs(j);
  if (status == ATTN_OK) status = run_operator(j);
  if (status == ATTN_OK) status = write_outputs(j);
  free_tensors(j);
  return status;
}

/* The command line ------------------------------------------------------------------------------
 */

static attn_status find_operator(const char *name, const mechanism **op) {
  attn_text names = {0};
  char *list;
  for (size_t i = 0; i < sizeof mechanisms / sizeof *mechanisms; ++i) {
    *op = &mechanisms[i];
    if (strcmp(name, mechanisms[i].name) == 0) {
      attn_text_free(&names);
      return ATTN_OK;
    }
    attn_text_print(&names, "%s%s", i ? ", " : "", mechanisms[i].name);
  }
  ATTN_TRY(attn_text_take(&names, &list));
  attn_status status =
      attn_fail(ATTN_INVALID_ARGUMENT, "--operator is \"%s\", expected one of: %s", name, list);
  attn_free(list);
  return status;
}

static attn_status parse_scale(const char *word, double *scale) {
  char *end;
  *scale = strtod(word, &end);
  if (end != word && !*end && isfinite(*scale) && *scale != 0) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "--scale is \"%s\", expected a number other than 0",
                   word);
}

static attn_status parse_option(job *j, const char *name, const char *value) {
  if (!value) return attn_fail(ATTN_INVALID_ARGUMENT, "%s is unknown, or lacks its value", name);
  if (strcmp(name, "--operator") == 0) return find_operator(value, &j->op);
  if (strcmp(name, "--scale") == 0) return parse_scale(value, &j->scale);
  if (strcmp(name, "--device") == 0) return attn_device_parse(value, &j->device);
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s is unknown", name);
}

static attn_status parse_words(job *j, int count, char **words) {
  for (int i = 1; i < count; ++i) {
    const char *word = words[i];
    if (strcmp(word, "--causal") == 0)
      j->causal = true;
    else if (word[0] == '-')
      ATTN_TRY(parse_option(j, word, words[++i]));
    else if (!j->in)
      j->in = word;
    else if (!j->out)
      j->out = word;
    else
      return attn_fail(ATTN_INVALID_ARGUMENT, "\"%s\" is a third file", word);
  }
  if (!j->out || !j->op)
    return attn_fail(ATTN_INVALID_ARGUMENT, "expected IN.safetensors OUT.safetensors --operator "
                                            "NAME [--causal] [--scale S] [--device NAME]");
  if (j->causal && j->op->recurrent)
    return attn_fail(ATTN_INVALID_ARGUMENT, "--causal is softmax's: %s always is", j->op->name);
  return ATTN_OK;
}

int main(int count, char **words) {
  enum { FAILED = 1, MISUSED = 2 };
  job j = {0};
  attn_status parsed = parse_words(&j, count, words);
  attn_status status = parsed == ATTN_OK ? run(&j) : parsed;
  if (status == ATTN_OK) return 0;
  fprintf(stderr, "bench_operator: %s\n", attn_error_message());
  return parsed == ATTN_OK ? FAILED : MISUSED;
}
