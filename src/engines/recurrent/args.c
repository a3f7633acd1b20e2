/* The tensors of one call: which are wanted, what shape they have, and where one head of one
 * sequence lies in each. One table row a tensor. */
#include "engines/recurrent/recurrent.h"
#include "base/status.h"

#include <stdio.h>
#include <string.h>

/* Axes after [batch, length] (or [total]): what a row of the table has. */
typedef enum axes {
  AXES_KEY,        /* heads, dim */
  AXES_VALUE,      /* value_heads, value_dim */
  AXES_DECAY,      /* by attn_decay */
  AXES_BETA,       /* value_heads */
  AXES_STATE,      /* [batch, value_heads, dim, value_dim] */
  AXES_NORMALISER, /* [batch, value_heads, dim] */
} axes;

typedef enum when { WHEN_ALWAYS, WHEN_DECAY, WHEN_DELTA, WHEN_NORMALISE } when;

typedef struct argument {
  const char *name;
  size_t in_args, in_head;
  axes axes;
  when when;    /* the problem has it */
  int required; /* passes that cannot do without */
  int used;     /* passes that read or write it */
  bool output;
} argument;

enum { F = ATTN_PASS_FORWARD, B = ATTN_PASS_BACKWARD };
#define WHERE(field) #field, offsetof(attn_recurrent_args, field), offsetof(recurrent_head, field)

static const argument arguments[] = {
    {WHERE(q), AXES_KEY, WHEN_ALWAYS, F | B, F | B, false},
    {WHERE(k), AXES_KEY, WHEN_ALWAYS, F | B, F | B, false},
    {WHERE(v), AXES_VALUE, WHEN_ALWAYS, F | B, F | B, false},
    {WHERE(o), AXES_VALUE, WHEN_ALWAYS, F, F, true},
    {WHERE(decay), AXES_DECAY, WHEN_DECAY, F | B, F | B, false},
    {WHERE(beta), AXES_BETA, WHEN_DELTA, F | B, F | B, false},
    {WHERE(initial_state), AXES_STATE, WHEN_ALWAYS, 0, F | B, false},
    {WHERE(final_state), AXES_STATE, WHEN_ALWAYS, 0, F, true},
    {WHERE(initial_normaliser), AXES_NORMALISER, WHEN_NORMALISE, 0, F | B, false},
    {WHERE(final_normaliser), AXES_NORMALISER, WHEN_NORMALISE, 0, F, true},
    {WHERE(d_o), AXES_VALUE, WHEN_ALWAYS, B, B, false},
    {WHERE(d_final_state), AXES_STATE, WHEN_ALWAYS, 0, B, false},
    {WHERE(d_final_normaliser), AXES_NORMALISER, WHEN_NORMALISE, 0, B, false},
    {WHERE(d_q), AXES_KEY, WHEN_ALWAYS, 0, B, true},
    {WHERE(d_k), AXES_KEY, WHEN_ALWAYS, 0, B, true},
    {WHERE(d_v), AXES_VALUE, WHEN_ALWAYS, 0, B, true},
    {WHERE(d_decay), AXES_DECAY, WHEN_DECAY, 0, B, true},
    {WHERE(d_beta), AXES_BETA, WHEN_DELTA, 0, B, true},
    {WHERE(d_initial_state), AXES_STATE, WHEN_ALWAYS, 0, B, true},
    {WHERE(d_initial_normaliser), AXES_NORMALISER, WHEN_NORMALISE, 0, B, true},
};
enum { ARGUMENTS = sizeof arguments / sizeof *arguments };

static const attn_tensor *tensor_of(const attn_recurrent_args *args, const argument *argument) {
  return (const attn_tensor *)((const char *)args + argument->in_args);
}

static bool applies(const attn_recurrent_problem *problem, const argument *argument) {
  switch (argument->when) {
  case WHEN_DECAY: return problem->decay != ATTN_DECAY_NONE;
  case WHEN_DELTA: return problem->update == ATTN_UPDATE_DELTA;
  case WHEN_NORMALISE: return problem->normalise;
  default: return true;
  }
}

static const char *const missing_feature[] = {"", "no decay", "the additive update",
                                              "no normaliser"};

/* Puts [batch, length] or [total] in front of the axes of tokens. */
static int token_axes(const attn_recurrent_problem *problem, int64_t total, int64_t *shape) {
  if (problem->ragged) {
    shape[0] = total;
    return 1;
  }
  shape[0] = problem->batch;
  shape[1] = problem->length;
  return 2;
}

static int expected_shape(const attn_recurrent_problem *problem, axes axes, int64_t total,
                          int64_t *shape) {
  int rank = 0;
  if (axes == AXES_STATE || axes == AXES_NORMALISER) {
    shape[rank++] = problem->batch;
    shape[rank++] = problem->value_heads;
    shape[rank++] = problem->dim;
    if (axes == AXES_STATE) shape[rank++] = problem->value_dim;
    return rank;
  }
  if (axes == AXES_DECAY && problem->decay == ATTN_DECAY_HEAD) {
    shape[0] = problem->value_heads;
    return 1;
  }
  rank = token_axes(problem, total, shape);
  shape[rank++] = axes == AXES_KEY ? problem->heads : problem->value_heads;
  if (axes == AXES_KEY || (axes == AXES_DECAY && problem->decay == ATTN_DECAY_CHANNEL))
    shape[rank++] = problem->dim;
  if (axes == AXES_VALUE) shape[rank++] = problem->value_dim;
  return rank;
}

static bool has_vectors(const attn_recurrent_problem *problem, axes axes) {
  return axes != AXES_BETA && (axes != AXES_DECAY || problem->decay == ATTN_DECAY_CHANNEL);
}

static void print_shape(char *text, size_t size, const int64_t *shape, int rank) {
  size_t used = (size_t)snprintf(text, size, "[");
  for (int i = 0; i < rank && used < size; ++i)
    used +=
        (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
  if (used < size) snprintf(text + used, size - used, "]");
}

static attn_status check_shape(const attn_recurrent_problem *problem, const argument *argument,
                               const attn_tensor *tensor, int64_t total) {
  int64_t shape[ATTN_MAX_RANK];
  int rank = expected_shape(problem, argument->axes, total, shape);
  bool same = tensor->rank == rank;
  for (int i = 0; same && i < rank; ++i) same = tensor->shape[i] == shape[i];
  if (same) return ATTN_OK;
  char expected[128], got[128];
  int got_rank = tensor->rank < 0 ? 0 : tensor->rank > ATTN_MAX_RANK ? ATTN_MAX_RANK : tensor->rank;
  print_shape(expected, sizeof expected, shape, rank);
  print_shape(got, sizeof got, tensor->shape, got_rank);
  return attn_fail(ATTN_INVALID_SHAPE, "recurrent: %s has shape %s, expected %s", argument->name,
                   got, expected);
}

static attn_status check_strides(const attn_recurrent_problem *problem, const argument *argument,
                                 const attn_tensor *tensor) {
  int last = tensor->rank - 1;
  if (has_vectors(problem, argument->axes) && tensor->shape[last] > 1 && tensor->stride[last] != 1)
    return attn_fail(ATTN_INVALID_SHAPE,
                     "recurrent: %s has stride %lld in its last dimension, expected 1",
                     argument->name, (long long)tensor->stride[last]);
  for (int i = 0; argument->output && i <= last; ++i)
    if (tensor->shape[i] > 1 && tensor->stride[i] == 0)
      return attn_fail(ATTN_INVALID_SHAPE,
                       "recurrent: %s is written, but has stride 0 along axis %d of extent %lld",
                       argument->name, i, (long long)tensor->shape[i]);
  return ATTN_OK;
}

static attn_dtype real_dtype(attn_dtype dtype) {
  return dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
}

static attn_status check_argument(const recurrent_plan *plan, const argument *argument,
                                  const attn_tensor *tensor, int pass, int64_t total) {
  const attn_recurrent_problem *problem = &plan->problem;
  bool tokens = argument->axes != AXES_STATE && argument->axes != AXES_NORMALISER &&
                !(argument->axes == AXES_DECAY && problem->decay == ATTN_DECAY_HEAD);
  bool empty = tokens && (problem->ragged ? total : problem->length) == 0;
  if (!applies(problem, argument)) {
    if (!tensor->data) return ATTN_OK;
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: %s is given, but the problem has %s",
                     argument->name, missing_feature[argument->when]);
  }
  if (!(argument->used & pass)) return ATTN_OK;
  if (!tensor->data) {
    if (!(argument->required & pass) || empty) return ATTN_OK;
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: %s is missing (its data is NULL)",
                     argument->name);
  }
  bool vector = argument->axes == AXES_KEY || argument->axes == AXES_VALUE;
  attn_dtype dtype = vector ? problem->dtype : real_dtype(problem->dtype);
  if (tensor->dtype != dtype)
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: %s is %s, expected %s", argument->name,
                     attn_dtype_name(tensor->dtype), attn_dtype_name(dtype));
  if (!attn_plan_has_device(&plan->base, tensor))
    return attn_fail(ATTN_UNSUPPORTED, "recurrent: %s is not in %s memory", argument->name,
                     plan->base.gpu ? "the GPU's" : "CPU");
  ATTN_TRY(check_shape(problem, argument, tensor, total));
  return check_strides(problem, argument, tensor);
}

static attn_status check_offsets(const attn_recurrent_problem *problem,
                                 const attn_recurrent_args *args, int64_t *total) {
  const int32_t *offsets = args->offsets;
  if (!offsets)
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: a ragged problem needs offsets");
  if (offsets[0] != 0)
    return attn_fail(ATTN_INVALID_SHAPE, "recurrent: offsets[0] is %d, expected 0",
                     (int)offsets[0]);
  for (int64_t b = 0; b < problem->batch; ++b) {
    int64_t length = (int64_t)offsets[b + 1] - offsets[b];
    if (length < 0 || length > problem->length)
      return attn_fail(ATTN_INVALID_SHAPE,
                       "recurrent: offsets give sequence %lld %lld tokens, expected 0 to %lld",
                       (long long)b, (long long)length, (long long)problem->length);
  }
  *total = offsets[problem->batch];
  return ATTN_OK;
}

attn_status attn_recurrent_check(const recurrent_plan *plan, const attn_recurrent_args *args,
                                 attn_pass pass, const void *workspace) {
  const attn_recurrent_problem *problem = &plan->problem;
  int64_t total = 0;
  if (problem->ragged && plan->base.gpu)
    total = args->q.shape[0]; /* offsets lie on the device */
  else if (problem->ragged)
    ATTN_TRY(check_offsets(problem, args, &total));
  if (problem->ragged && !args->offsets)
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: a ragged problem needs offsets");
  for (int i = 0; i < ARGUMENTS; ++i)
    ATTN_TRY(check_argument(plan, arguments + i, tensor_of(args, arguments + i), (int)pass, total));
  if (plan->base.info.workspace_bytes && (!workspace || (uintptr_t)workspace % 64))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "recurrent: workspace is %s, expected %zu bytes aligned to 64",
                     workspace ? "not aligned" : "NULL", plan->base.info.workspace_bytes);
  return ATTN_OK;
}

static recurrent_rows rows_of(const attn_recurrent_problem *problem, const argument *argument,
                              const attn_tensor *tensor, int64_t sequence, int64_t start,
                              int64_t head) {
  const int64_t *stride = tensor->stride;
  int64_t offset, row;
  int64_t reader = head / (problem->value_heads / problem->heads);
  if (argument->axes == AXES_STATE || argument->axes == AXES_NORMALISER) {
    offset = sequence * stride[0] + head * stride[1];
    row = stride[2];
  } else if (argument->axes == AXES_DECAY && problem->decay == ATTN_DECAY_HEAD) {
    offset = head * stride[0];
    row = 0;
  } else {
    int axis = problem->ragged ? 0 : 1; /* of tokens */
    offset = (problem->ragged ? start * stride[0] : sequence * stride[0]) +
             (argument->axes == AXES_KEY ? reader : head) * stride[axis + 1];
    row = stride[axis];
  }
  return (recurrent_rows){(char *)tensor->data + offset * (int64_t)attn_dtype_size(tensor->dtype),
                          row};
}

void attn_recurrent_find_head(const recurrent_plan *plan, const attn_recurrent_args *args,
                              attn_pass pass, int64_t sequence, int64_t head,
                              recurrent_head *found) {
  const attn_recurrent_problem *problem = &plan->problem;
  int64_t start = problem->ragged ? args->offsets[sequence] : 0;
  memset(found, 0, sizeof *found);
  found->tokens = problem->ragged ? args->offsets[sequence + 1] - start : problem->length;
  for (int i = 0; i < ARGUMENTS; ++i) {
    const attn_tensor *tensor = tensor_of(args, arguments + i);
    if (!tensor->data || !(arguments[i].used & (int)pass)) continue;
    recurrent_rows *rows = (recurrent_rows *)((char *)found + arguments[i].in_head);
    *rows = rows_of(problem, arguments + i, tensor, sequence, start, head);
  }
}
