/* Embedding texts: batches through the encoder or the decoder, then pooling. Rows are summed in
 * float64, so that a text's embedding does not depend on how its tokens lie in memory. */
#include "attn/embedding.h"
#include "base/memory.h"
#include "base/status.h"
#include "graph/operations.h"
#include "models/model.h"

#include <math.h>
#include <string.h>

/* Tokens of each thread that go through the layers together: enough for products of full speed, few
 * enough for a layer's activations to stay in the caches. */
enum { THREAD_TOKENS = 512 };

const char *attn_pooling_name(attn_pooling pooling) {
  static const char *const names[] = {
      [ATTN_POOLING_MEAN] = "mean",           [ATTN_POOLING_CLS] = "cls",
      [ATTN_POOLING_LAST] = "last",           [ATTN_POOLING_MAX] = "max",
      [ATTN_POOLING_MEAN_SQRT] = "mean-sqrt", [ATTN_POOLING_WEIGHTED_MEAN] = "weighted-mean"};
  return pooling > ATTN_POOLING_DEFAULT && pooling < ATTN_POOLINGS ? names[pooling] : NULL;
}

int64_t attn_model_embedding_size(const attn_model *model) {
  return model ? model->config.hidden : 0;
}

/* A model that was made and not loaded has no files. */
static attn_pooling pooling_of(const attn_model *model) {
  return model->embedding_config.pooling ? model->embedding_config.pooling : ATTN_POOLING_MEAN;
}

attn_status attn_model_get_embedding_info(const attn_model *model, attn_embedding_info *info) {
  if (!model || !info)
    return attn_fail(ATTN_INVALID_ARGUMENT, "embedding_info: the model or the result is NULL");
  *info = (attn_embedding_info){.size = model->config.hidden,
                                .most_tokens = model->embedding_config.most_tokens,
                                .pooling = pooling_of(model),
                                .normalize = model->embedding_config.normalize};
  return ATTN_OK;
}

/* Tokens -----------------------------------------------------------------------------------------
 */

attn_status attn_model_encode_for_embedding(const attn_model *model, const char *text, size_t size,
                                            int32_t *tokens, int64_t capacity, int64_t *count,
                                            bool *cut) {
  const unsigned flags = ATTN_ENCODE_ENDS | ATTN_ENCODE_SPECIAL;
  attn_tokens made = {0};
  if (!model || (size && !text) || !count || (capacity > 0 && !tokens) || capacity < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "encode: model, text, tokens or count is NULL");
  attn_status status = attn_model_text_encode(&model->text, text, size, flags, &made);
  if (status != ATTN_OK) {
    attn_tokens_free(&made);
    return status;
  }
  size_t most = (size_t)model->embedding_config.most_tokens;
  size_t ends = model->text.tokenizer ? attn_tokenizer_suffix(model->text.tokenizer) : 0;
  bool too_long = most && made.count > most && ends < most;
  if (too_long) {
    memmove(made.ids + most - ends, made.ids + made.count - ends, ends * sizeof *made.ids);
    made.count = most;
  }
  size_t copied = made.count < (size_t)capacity ? made.count : (size_t)capacity;
  if (copied) memcpy(tokens, made.ids, copied * sizeof *tokens);
  *count = (int64_t)made.count;
  if (cut) *cut = too_long;
  attn_tokens_free(&made);
  return ATTN_OK;
}

/* Pooling ----------------------------------------------------------------------------------------
 */

/* What row i of n adds to the sum; poolings that are sums. */
static double weight_of(attn_pooling pooling, int64_t i, int64_t n) {
  double count = (double)n;
  switch (pooling) {
  case ATTN_POOLING_CLS: return i == 0;
  case ATTN_POOLING_LAST: return i == n - 1;
  case ATTN_POOLING_MEAN_SQRT: return 1 / sqrt(count);
  case ATTN_POOLING_WEIGHTED_MEAN: return (double)(i + 1) / (count * (count + 1) / 2);
  default: return 1 / count;
  }
}

/* The rows [first, first + n) of `rows` [.., width] as one, into sum [width]; scratch [width]. */
static void pool(const attn_kernels *kernels, attn_pooling pooling, const attn_tensor *rows,
                 int64_t first, int64_t n, double *sum, double *scratch) {
  int64_t width = rows->shape[1];
  attn_span to = {sum, ATTN_F64}, row = {scratch, ATTN_F64};
  for (int64_t i = 0; i < n; ++i) {
    attn_span from = attn_row(rows, rows->stride[0], first + i);
    if (pooling == ATTN_POOLING_MAX) {
      kernels->row_add(row, 1, from, 0, (attn_span){0}, width);
      for (int64_t c = 0; c < width; ++c) sum[c] = i && sum[c] > scratch[c] ? sum[c] : scratch[c];
      continue;
    }
    double weight = weight_of(pooling, i, n);
    if (i == 0)
      kernels->row_add(to, weight, from, 0, (attn_span){0}, width);
    else if (weight != 0)
      kernels->row_add(to, 1, to, weight, from, width);
  }
}

/* As float32, of length 1 if wanted; a vector of nothing but zeros stays. */
static void write_embedding(const double *sum, int64_t width, bool normalize, float *embedding) {
  const double least = 1e-12;
  double squares = 0;
  for (int64_t c = 0; normalize && c < width; ++c) squares += sum[c] * sum[c];
  double length = normalize ? fmax(sqrt(squares), least) : 1;
  for (int64_t c = 0; c < width; ++c) embedding[c] = (float)(sum[c] / length);
}

/* Batches ----------------------------------------------------------------------------------------
 */

typedef struct job {
  const attn_model *model;
  const int32_t *tokens;
  const int64_t *offsets;
  attn_pooling pooling;
  bool normalize;
  float *embeddings;
} job;

static attn_status check(const attn_model *model, const int32_t *tokens, const int64_t *offsets,
                         int64_t count, const attn_embedding_options *o, const float *embeddings) {
  if (!model || count < 0 || (count && (!tokens || !offsets || !embeddings)))
    return attn_fail(ATTN_INVALID_ARGUMENT, "embed: an argument is NULL, or count below 0");
  if (o->struct_size != sizeof *o)
    return attn_fail(ATTN_INVALID_ARGUMENT, "embed: struct_size is %zu, expected %zu",
                     o->struct_size, sizeof *o);
  if (o->pooling < ATTN_POOLING_DEFAULT || o->pooling >= ATTN_POOLINGS || o->normalize < -1 ||
      o->normalize > 1 || o->batch_tokens < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "embed: pooling %d, normalize %d or batch_tokens %lld is unknown",
                     (int)o->pooling, o->normalize, (long long)o->batch_tokens);
  for (int64_t i = 0; i < count; ++i)
    if (offsets[i] < 0 || offsets[i + 1] <= offsets[i] || offsets[i + 1] - offsets[i] > INT32_MAX)
      return attn_fail(ATTN_INVALID_ARGUMENT, "embed: text %lld has the tokens %lld to %lld",
                       (long long)i, (long long)offsets[i], (long long)offsets[i + 1]);
  if (model->embedding_config.unsupported[0])
    return attn_fail(ATTN_UNSUPPORTED, "embed: %s", model->embedding_config.unsupported);
  return ATTN_OK;
}

/* How many texts from `first` on make a batch. */
static int64_t batch_size(const int64_t *offsets, int64_t first, int64_t count, int64_t most) {
  int64_t last = first + 1;
  while (last < count && offsets[last + 1] - offsets[first] <= most) ++last;
  return last - first;
}

static attn_var *hidden_rows(attn_graph *g, const attn_model *model, const attn_layout *layout,
                             const int32_t *tokens) {
  if (model->config.encoder) return attn_encoder_hidden(g, model, layout, tokens, NULL);
  return attn_decoder_hidden(g, model, layout, tokens, NULL, 0, 0);
}

/* A copy of rows in the processor's memory, until the graph's reset. */
static attn_status bring_home(attn_graph *g, const attn_tensor *rows, attn_tensor *copy) {
  void *memory =
      attn_arena_alloc(g->arena, (size_t)attn_tensor_count(rows) * attn_dtype_size(rows->dtype));
  if (!memory) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(attn_tensor_wrap(memory, rows->dtype, rows->rank, rows->shape, copy));
  return attn_tensor_copy(rows, copy);
}

static attn_status run_batch(attn_graph *g, const job *j, int64_t first, int64_t texts) {
  int64_t width = j->model->config.hidden;
  const int64_t *from = j->offsets + first;
  attn_graph_reset(g, false);
  int32_t *offsets = attn_arena_alloc(g->arena, (size_t)(texts + 1) * sizeof *offsets);
  double *sums = attn_arena_alloc(g->arena, (size_t)(2 * width) * sizeof *sums);
  if (!offsets || !sums) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i <= texts; ++i) offsets[i] = (int32_t)(from[i] - from[0]);
  attn_layout layout =
      texts == 1 ? attn_layout_equal(1, offsets[1]) : attn_layout_packed(texts, offsets);
  attn_var *hidden = hidden_rows(g, j->model, &layout, j->tokens + from[0]);
  ATTN_TRY(attn_graph_status(g));
  attn_tensor rows = hidden->value;
  if (g->gpu) ATTN_TRY(bring_home(g, &hidden->value, &rows));
  for (int64_t i = 0; i < texts; ++i) {
    pool(g->kernels, j->pooling, &rows, offsets[i], offsets[i + 1] - offsets[i], sums,
         sums + width);
    write_embedding(sums, width, j->normalize, j->embeddings + (first + i) * width);
  }
  return ATTN_OK;
}

attn_status attn_model_embed(const attn_model *model, const int32_t *tokens, const int64_t *offsets,
                             int64_t count, const attn_embedding_options *options,
                             float *embeddings) {
  const attn_embedding_options defaults = ATTN_EMBEDDING_OPTIONS_INIT;
  const attn_embedding_options *o = options ? options : &defaults;
  ATTN_TRY(check(model, tokens, offsets, count, o, embeddings));
  const job j = {.model = model,
                 .tokens = tokens,
                 .offsets = offsets,
                 .pooling = o->pooling ? o->pooling : pooling_of(model),
                 .normalize = o->normalize < 0 ? model->embedding_config.normalize : o->normalize,
                 .embeddings = embeddings};
  int64_t most = o->batch_tokens ? o->batch_tokens : THREAD_TOKENS * (int64_t)attn_get_threads();
  attn_graph *graph;
  ATTN_TRY(attn_graph_create_on(model->device, model->compute, &graph));
  attn_status status = ATTN_OK;
  for (int64_t first = 0, texts; first < count && status == ATTN_OK; first += texts) {
    texts = batch_size(offsets, first, count, most < INT32_MAX ? most : INT32_MAX);
    status = run_batch(graph, &j, first, texts);
  }
  attn_graph_destroy(graph);
  return status;
}
