/* Checks the tensors of one execution against the plan, and views them sequence by sequence. */
#include "base/status.h"
#include "engines/softmax/softmax.h"

#include <stdio.h>

/* Shape as text for messages: "[2, 16, 4, 64]". */
static const char *shape_text(char text[128], int rank, const int64_t *shape) {
  int length = snprintf(text, 128, "[");
  for (int i = 0; i < rank && length < 100; ++i)
    length += snprintf(text + length, (size_t)(128 - length), "%s%lld", i ? ", " : "",
                       (long long)shape[i]);
  snprintf(text + length, (size_t)(128 - length), "]");
  return text;
}

enum { DENSE = 1, WRITTEN = 2, OPTIONAL = 4 }; /* DENSE: innermost stride 1 */

/* An extent of -1 in `shape` fits any. */
static attn_status check_tensor(const char *name, const attn_tensor *tensor, attn_dtype dtype,
                                int rank, const int64_t *shape, int flags) {
  if (!tensor->data) {
    if (flags & OPTIONAL) return ATTN_OK;
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: %s is missing", name);
  }
  if (tensor->dtype != dtype)
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: %s is %s, expected %s", name,
                     attn_dtype_name(tensor->dtype), attn_dtype_name(dtype));
  bool fits = tensor->rank == rank;
  for (int i = 0; fits && i < rank; ++i)
    fits = shape[i] < 0 ? tensor->shape[i] >= 0 : tensor->shape[i] == shape[i];
  char got[128], expected[128];
  if (!fits)
    return attn_fail(ATTN_INVALID_SHAPE, "softmax: %s has shape %s, expected %s", name,
                     shape_text(got, tensor->rank, tensor->shape),
                     shape_text(expected, rank, shape));
  if (flags & DENSE && tensor->shape[rank - 1] > 1 && tensor->stride[rank - 1] != 1)
    return attn_fail(ATTN_INVALID_SHAPE, "softmax: %s has stride %lld in its last axis, expected 1",
                     name, (long long)tensor->stride[rank - 1]);
  for (int i = 0; flags & WRITTEN && i < rank; ++i)
    if (tensor->stride[i] == 0 && tensor->shape[i] > 1)
      return attn_fail(ATTN_INVALID_SHAPE,
                       "softmax: %s has stride 0 in axis %d, but every element is written", name,
                       i);
  return ATTN_OK;
}

/* The tensors of a call lie where the plan runs. */
static attn_status check_devices(const softmax_plan *plan, const attn_softmax_args *args) {
  const struct {
    const char *name;
    const attn_tensor *tensor;
  } all[] = {{"q", &args->q},
             {"k", &args->k},
             {"v", &args->v},
             {"o", &args->o},
             {"lse", &args->lse},
             {"bias", &args->bias},
             {"d_o", &args->d_o},
             {"d_lse", &args->d_lse},
             {"d_q", &args->d_q},
             {"d_k", &args->d_k},
             {"d_v", &args->d_v},
             {"d_bias", &args->d_bias},
             {"sinks", &args->sinks},
             {"d_sinks", &args->d_sinks},
             {"alibi_slopes", &args->alibi_slopes},
             {"page_table", &args->page_table},
             {"block_offsets", &args->block_offsets},
             {"block_indices", &args->block_indices}};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
    if (all[i].tensor->data && !attn_plan_has_device(&plan->base, all[i].tensor))
      return attn_fail(ATTN_UNSUPPORTED, "softmax: %s is not in %s memory", all[i].name,
                       plan->base.gpu ? "the GPU's" : "CPU");
  return ATTN_OK;
}

static attn_status check_offsets(const char *name, const int32_t *offsets, int64_t batch,
                                 int64_t longest, int64_t total) {
  if (!offsets) return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: ragged, but %s is NULL", name);
  if (offsets[0] < 0)
    return attn_fail(ATTN_INVALID_SHAPE, "softmax: %s[0] is %d, expected >= 0", name, offsets[0]);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t length = (int64_t)offsets[b + 1] - offsets[b];
    if (length < 0 || length > longest)
      return attn_fail(ATTN_INVALID_SHAPE,
                       "softmax: %s[%lld] - %s[%lld] is %lld, expected 0 to %lld", name,
                       (long long)b + 1, name, (long long)b, (long long)length, (long long)longest);
  }
  if (total >= 0 && offsets[batch] > total)
    return attn_fail(ATTN_INVALID_SHAPE, "softmax: %s[%lld] is %d, but there are %lld tokens", name,
                     (long long)batch, offsets[batch], (long long)total);
  return ATTN_OK;
}

/* Keys of a sequence before key_lengths shortens it. */
static int64_t stored_keys(const attn_softmax_problem *problem, const attn_softmax_args *args,
                           int64_t b) {
  return problem->ragged ? (int64_t)args->key_offsets[b + 1] - args->key_offsets[b]
                         : problem->key_length;
}

static int64_t keys_of(const attn_softmax_problem *problem, const attn_softmax_args *args,
                       int64_t b) {
  return args->key_lengths ? args->key_lengths[b] : stored_keys(problem, args, b);
}

static attn_status check_lengths(const attn_softmax_problem *problem,
                                 const attn_softmax_args *args) {
  if (problem->ragged) {
    ATTN_TRY(check_offsets("query_offsets", args->query_offsets, problem->batch,
                           problem->query_length, args->q.shape[0]));
    ATTN_TRY(check_offsets("key_offsets", args->key_offsets, problem->batch, problem->key_length,
                           problem->paged ? -1 : args->k.shape[0]));
  }
  for (int64_t b = 0; args->key_lengths && b < problem->batch; ++b) {
    int64_t stored = stored_keys(problem, args, b);
    if (args->key_lengths[b] < 0 || args->key_lengths[b] > stored)
      return attn_fail(ATTN_INVALID_SHAPE, "softmax: key_lengths[%lld] is %d, expected 0 to %lld",
                       (long long)b, args->key_lengths[b], (long long)stored);
  }
  return ATTN_OK;
}

static attn_status check_pages(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  const attn_tensor *table = &args->page_table;
  const int64_t shape[] = {problem->batch, -1};
  ATTN_TRY(check_tensor("page_table", table, ATTN_I32, 2, shape, DENSE));
  if (attn_is_cuda(table->device)) return ATTN_OK;
  const int32_t *pages = table->data;
  for (int64_t b = 0; b < problem->batch; ++b) {
    int64_t used = attn_ceil_div(keys_of(problem, args, b), problem->page_size);
    if (used > table->shape[1])
      return attn_fail(ATTN_INVALID_SHAPE,
                       "softmax: page_table has %lld pages a sequence, sequence %lld needs %lld",
                       (long long)table->shape[1], (long long)b, (long long)used);
    for (int64_t p = 0; p < used; ++p) {
      int32_t page = pages[b * table->stride[0] + p];
      if (page < 0 || page >= args->k.shape[0])
        return attn_fail(ATTN_INVALID_SHAPE,
                         "softmax: page_table[%lld][%lld] is %d, expected 0 to %lld", (long long)b,
                         (long long)p, page, (long long)args->k.shape[0] - 1);
    }
  }
  return ATTN_OK;
}

static attn_status check_list(const int32_t *list, int64_t first, int64_t end, int64_t blocks) {
  for (int64_t e = first; e < end; ++e) {
    if (list[e] < 0 || list[e] >= blocks)
      return attn_fail(ATTN_INVALID_SHAPE, "softmax: block_indices[%lld] is %d, expected 0 to %lld",
                       (long long)e, list[e], (long long)blocks - 1);
    if (e > first && list[e] <= list[e - 1])
      return attn_fail(ATTN_INVALID_SHAPE,
                       "softmax: block_indices[%lld] is %d behind %d: a list has to ascend",
                       (long long)e, list[e], list[e - 1]);
  }
  return ATTN_OK;
}

static attn_status check_lists(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  const attn_tensor *offsets = &args->block_offsets, *indices = &args->block_indices;
  const int64_t query_blocks = attn_ceil_div(problem->query_length, problem->list_queries);
  const int64_t shape[] = {problem->batch, problem->heads, query_blocks + 1}, entries[] = {-1};
  ATTN_TRY(check_tensor("block_offsets", offsets, ATTN_I32, 3, shape, 0));
  ATTN_TRY(check_tensor("block_indices", indices, ATTN_I32, 1, entries, DENSE));
  if (attn_is_cuda(offsets->device)) return ATTN_OK;
  const int64_t *stride = offsets->stride;
  int64_t batches = stride[0] ? problem->batch : 1, heads = stride[1] ? problem->heads : 1;
  for (int64_t list = 0; list < batches * heads * query_blocks; ++list) {
    int64_t block = list % query_blocks, head = list / query_blocks % heads;
    int64_t b = list / query_blocks / heads;
    const int32_t *offset =
        (const int32_t *)offsets->data + b * stride[0] + head * stride[1] + block * stride[2];
    int64_t first = offset[0], end = offset[stride[2]];
    if (first < 0 || end < first || end > indices->shape[0])
      return attn_fail(ATTN_INVALID_SHAPE,
                       "softmax: block_offsets[%lld][%lld] has %lld and %lld at %lld, expected "
                       "ascending numbers from 0 to %lld",
                       (long long)b, (long long)head, (long long)first, (long long)end,
                       (long long)block, (long long)indices->shape[0]);
    ATTN_TRY(check_list(indices->data, first, end,
                        attn_ceil_div(problem->key_length, problem->list_keys)));
  }
  return ATTN_OK;
}

/* A tensor of tokens: [batch, length, heads, width], or [total, heads, width] when ragged. */
static attn_status check_tokens(const attn_softmax_problem *problem, const char *name,
                                const attn_tensor *tensor, int64_t length, int64_t total,
                                int64_t heads, int64_t width, int flags) {
  const int64_t dense[] = {problem->batch, length, heads, width}, ragged[] = {total, heads, width};
  if (problem->ragged) return check_tensor(name, tensor, problem->dtype, 3, ragged, flags | DENSE);
  return check_tensor(name, tensor, problem->dtype, 4, dense, flags | DENSE);
}

static attn_status check_keys(const attn_softmax_problem *problem, const char *name,
                              const attn_tensor *tensor, int64_t total, int64_t width) {
  const int64_t paged[] = {total, problem->page_size, problem->kv_heads, width};
  if (problem->paged) return check_tensor(name, tensor, problem->dtype, 4, paged, DENSE);
  return check_tokens(problem, name, tensor, problem->key_length, total, problem->kv_heads, width,
                      0);
}

static attn_status check_statistics(const attn_softmax_problem *problem, const char *name,
                                    const attn_tensor *tensor, int64_t total, int flags) {
  attn_dtype real = problem->dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  const int64_t dense[] = {problem->batch, problem->heads, problem->query_length};
  const int64_t ragged[] = {problem->heads, total};
  if (problem->ragged) return check_tensor(name, tensor, real, 2, ragged, flags);
  return check_tensor(name, tensor, real, 3, dense, flags);
}

static attn_status check_score_terms(const attn_softmax_problem *problem,
                                     const attn_softmax_args *args) {
  attn_dtype real = problem->dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  const int64_t full[] = {problem->batch, problem->heads, problem->query_length,
                          problem->key_length};
  const int64_t heads[] = {problem->heads};
  if (problem->bias) ATTN_TRY(check_tensor("bias", &args->bias, real, 4, full, 0));
  if (problem->alibi)
    ATTN_TRY(check_tensor("alibi_slopes", &args->alibi_slopes, ATTN_F32, 1, heads, DENSE));
  if (problem->sinks) ATTN_TRY(check_tensor("sinks", &args->sinks, ATTN_F32, 1, heads, DENSE));
  return ATTN_OK;
}

static attn_status check_backward(const attn_softmax_problem *problem,
                                  const attn_softmax_args *args, int64_t queries, int64_t keys) {
  attn_dtype real = problem->dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  const int64_t full[] = {problem->batch, problem->heads, problem->query_length,
                          problem->key_length};
  const int64_t heads[] = {problem->heads};
  ATTN_TRY(check_tokens(problem, "d_o", &args->d_o, problem->query_length, queries, problem->heads,
                        problem->value_dim, 0));
  ATTN_TRY(check_statistics(problem, "d_lse", &args->d_lse, queries, OPTIONAL));
  ATTN_TRY(check_tokens(problem, "d_q", &args->d_q, problem->query_length, queries, problem->heads,
                        problem->dim, WRITTEN));
  ATTN_TRY(check_tokens(problem, "d_k", &args->d_k, problem->key_length, keys, problem->kv_heads,
                        problem->dim, WRITTEN));
  ATTN_TRY(check_tokens(problem, "d_v", &args->d_v, problem->key_length, keys, problem->kv_heads,
                        problem->value_dim, WRITTEN));
  if (problem->bias)
    ATTN_TRY(check_tensor("d_bias", &args->d_bias, real, 4, full, WRITTEN | OPTIONAL));
  if (problem->sinks)
    ATTN_TRY(
        check_tensor("d_sinks", &args->d_sinks, ATTN_F32, 1, heads, DENSE | WRITTEN | OPTIONAL));
  return ATTN_OK;
}

attn_status attn_softmax_check(const softmax_plan *plan, const attn_softmax_args *args,
                               attn_pass pass, const void *workspace) {
  const attn_softmax_problem *problem = &plan->problem;
  bool forward = pass == ATTN_PASS_FORWARD;
  if (!(problem->passes & (int)pass))
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: the plan was not made for the %s pass",
                     forward ? "forward" : "backward");
  bool wanted = !plan->base.gpu || plan->base.info.workspace_bytes;
  if (wanted && (((uintptr_t)workspace & 63) || !workspace))
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: workspace is %s, expected %zu bytes",
                     workspace ? "not aligned to 64 bytes" : "NULL",
                     plan->base.info.workspace_bytes);
  ATTN_TRY(check_devices(plan, args));
  int64_t queries = args->q.shape[0], keys = args->k.shape[0];
  ATTN_TRY(check_tokens(problem, "q", &args->q, problem->query_length, -1, problem->heads,
                        problem->dim, 0));
  ATTN_TRY(check_keys(problem, "k", &args->k, -1, problem->dim));
  ATTN_TRY(check_keys(problem, "v", &args->v, keys, problem->value_dim));
  ATTN_TRY(check_tokens(problem, "o", &args->o, problem->query_length, queries, problem->heads,
                        problem->value_dim, forward ? WRITTEN : 0));
  ATTN_TRY(check_statistics(problem, "lse", &args->lse, queries, forward ? WRITTEN | OPTIONAL : 0));
  ATTN_TRY(check_score_terms(problem, args));
  if (!plan->base.gpu) ATTN_TRY(check_lengths(problem, args));
  if (problem->ragged && (!args->query_offsets || !args->key_offsets))
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: ragged, but offsets are NULL");
  if (problem->paged) ATTN_TRY(check_pages(problem, args));
  if (problem->list_keys) ATTN_TRY(check_lists(problem, args));
  return forward ? ATTN_OK : check_backward(problem, args, queries, keys);
}

/* The rows of sequence b of a [batch, length, heads, width] or [total, heads, width] tensor. */
static attn_softmax_rows token_rows(const attn_tensor *tensor, bool ragged, const int32_t *offsets,
                                    int64_t b) {
  attn_softmax_rows rows = {.data = tensor->data, .dtype = tensor->dtype};
  if (!tensor->data) return rows;
  rows.token = tensor->stride[ragged ? 0 : 1];
  rows.head = tensor->stride[ragged ? 1 : 2];
  int64_t start = ragged ? offsets[b] * rows.token : b * tensor->stride[0];
  rows.data += start * (int64_t)attn_dtype_size(tensor->dtype);
  return rows;
}

/* The same of a [batch, heads, length, ...] or [heads, total] tensor. */
static attn_softmax_rows head_rows(const attn_tensor *tensor, bool ragged, const int32_t *offsets,
                                   int64_t b) {
  attn_softmax_rows rows = {.data = tensor->data, .dtype = tensor->dtype};
  if (!tensor->data) return rows;
  rows.head = tensor->stride[ragged ? 0 : 1];
  rows.token = tensor->stride[ragged ? 1 : 2];
  int64_t start = ragged ? offsets[b] * rows.token : b * tensor->stride[0];
  rows.data += start * (int64_t)attn_dtype_size(tensor->dtype);
  return rows;
}

static attn_softmax_rows key_rows(const attn_softmax_problem *problem,
                                  const attn_softmax_args *args, const attn_tensor *tensor,
                                  int64_t b) {
  if (!problem->paged) return token_rows(tensor, problem->ragged, args->key_offsets, b);
  return (attn_softmax_rows){
      .data = tensor->data,
      .dtype = tensor->dtype,
      .token = tensor->stride[1],
      .head = tensor->stride[2],
      .pages = (const int32_t *)args->page_table.data + b * args->page_table.stride[0],
      .page_size = problem->page_size,
      .page_stride = tensor->stride[0],
  };
}

attn_softmax_sequence attn_softmax_sequence_of(const softmax_plan *plan,
                                               const attn_softmax_args *args, int64_t b) {
  const attn_softmax_problem *problem = &plan->problem;
  bool ragged = problem->ragged;
  const int32_t *offsets = args->query_offsets;
  const attn_tensor absent = {0}, *lists = &args->block_offsets;
  const int32_t *list_offsets =
      problem->list_keys ? (const int32_t *)lists->data + b * lists->stride[0] : NULL;
  return (attn_softmax_sequence){
      .batch = b,
      .stored_keys = stored_keys(problem, args, b),
      .queries = ragged ? offsets[b + 1] - offsets[b] : problem->query_length,
      .keys = keys_of(problem, args, b),
      .q = token_rows(&args->q, ragged, offsets, b),
      .k = key_rows(problem, args, &args->k, b),
      .v = key_rows(problem, args, &args->v, b),
      .o = token_rows(&args->o, ragged, offsets, b),
      .d_o = token_rows(&args->d_o, ragged, offsets, b),
      .d_q = token_rows(&args->d_q, ragged, offsets, b),
      .d_k = token_rows(&args->d_k, ragged, args->key_offsets, b),
      .d_v = token_rows(&args->d_v, ragged, args->key_offsets, b),
      .lse = head_rows(&args->lse, ragged, offsets, b),
      .d_lse = head_rows(&args->d_lse, ragged, offsets, b),
      .bias = head_rows(problem->bias ? &args->bias : &absent, false, NULL, b),
      .d_bias = head_rows(problem->bias ? &args->d_bias : &absent, false, NULL, b),
      .bias_key = args->bias.stride[3],
      .d_bias_key = args->d_bias.stride[3],
      .list_offsets = list_offsets,
      .list = args->block_indices.data,
      .list_head = lists->stride[1],
      .list_block = lists->stride[2],
  };
}

attn_status attn_softmax_run_on_gpu(const softmax_plan *plan, const attn_softmax_args *args,
                                    attn_pass pass, void *workspace) {
  const attn_plan *base = &plan->base;
  const attn_cuda_choice *choice = &base->choice[pass == ATTN_PASS_BACKWARD];
  return attn_gpu_check(
      base->gpu, base->gpu->cuda->softmax_run(&base->gpu->device, choice, &plan->problem, pass,
                                              args, workspace, attn_gpu_stream(base->gpu)));
}
