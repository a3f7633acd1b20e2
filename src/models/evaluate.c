/* Perplexity: the mean loss over a text, window by window. And accuracy on a task with labels. */
#include "base/memory.h"
#include "base/status.h"
#include "graph/operations.h"
#include "graph/passes.h"
#include "models/model.h"

/* The loss of the tokens [first, last) given tokens [start, first), summed. */
static attn_status window_loss(const attn_model *model, attn_graph *g, const int32_t *tokens,
                               int64_t start, int64_t first, int64_t last, double *sum) {
  int64_t rows = last - 1 - start;
  attn_graph_reset(g, false);
  int32_t *targets = attn_arena_alloc(g->arena, (size_t)rows * sizeof *targets);
  if (!targets) return ATTN_OUT_OF_MEMORY;
  for (int64_t r = 0; r < rows; ++r)
    targets[r] = start + r + 1 >= first ? tokens[start + r + 1] : -1;
  attn_layout layout = attn_layout_equal(1, rows);
  attn_var *loss = attn_decoder_loss(g, model, &layout, tokens + start, targets, 0, 0);
  ATTN_TRY(attn_graph_status(g));
  *sum += attn_tensor_get(&loss->value, (int64_t[]){0}) * (double)(last - first);
  return ATTN_OK;
}

attn_status attn_model_evaluate(const attn_model *model, const int32_t *tokens, int64_t count,
                                int64_t window, int64_t overlap, double *mean_loss,
                                int64_t *counted) {
  const int64_t usual_window = 2048;
  ATTN_TRY(attn_model_check_decoder(model, "evaluate"));
  if (window == 0) window = usual_window;
  if (count < 2 || window < 2 || overlap < 0 || overlap >= window - 1)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "evaluate: %lld tokens in windows of %lld with an "
                     "overlap of %lld",
                     (long long)count, (long long)window, (long long)overlap);
  attn_graph *graph;
  ATTN_TRY(attn_graph_create_on(model->device, model->compute, &graph));
  double sum = 0;
  attn_status status = ATTN_OK;
  /* `first` is the next token to be predicted; each window begins `overlap` + 1 tokens before. */
  for (int64_t first = 1; first < count && status == ATTN_OK;) {
    int64_t start = first - 1 - overlap > 0 ? first - 1 - overlap : 0;
    int64_t last = start + window < count ? start + window : count;
    status = window_loss(model, graph, tokens, start, first, last, &sum);
    first = last;
  }
  attn_graph_destroy(graph);
  *mean_loss = sum / (double)(count - 1);
  *counted = count - 1;
  return status;
}

/* Accuracy --------------------------------------------------------------------------------------
 */

/* Which of the rows have labels, in order. */
static int64_t find_labelled(const int32_t *labels, int64_t rows, int32_t *index) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r)
    if (labels[r] >= 0) index[count++] = (int32_t)r;
  return count;
}

/* hit[i]: whether the most likely token of row index[i] is its label. `logits` has room for `count`
 * rows. */
static attn_status judge(const attn_model *model, attn_graph *g, const attn_var *hidden,
                         const int32_t *index, int64_t count, const int32_t *labels,
                         const attn_tensor *logits, bool *hit) {
  int64_t width = hidden->value.shape[1], vocabulary = logits->shape[1];
  attn_graph_mark mark = attn_graph_get_mark(g);
  attn_tensor rows = attn_graph_tensor(g, hidden->value.dtype, 2, (int64_t[]){count, width}), to;
  const int32_t *there = attn_pass_upload(g, index, (size_t)count * sizeof *index);
  if (!rows.data || !there) return g->status;
  attn_pass_gather(g, &rows, 1, &hidden->value, there);
  attn_var *found = attn_decoder_logits(g, model, attn_graph_input(g, &rows));
  ATTN_TRY(attn_graph_status(g));
  ATTN_TRY(attn_tensor_slice(logits, 0, 0, count, &to));
  ATTN_TRY(attn_tensor_copy(&found->value, &to));
  for (int64_t i = 0; i < count; ++i) {
    const float *row = (const float *)to.data + i * vocabulary;
    int64_t best = 0;
    for (int64_t t = 1; t < vocabulary; ++t)
      if (row[t] > row[best]) best = t;
    hit[i] = best == labels[index[i]];
  }
  attn_graph_release(g, mark);
  return ATTN_OK;
}

/* The sum over `batch` sequences of the share of each one's labels that are hit. */
static attn_status judge_batch(const attn_model *model, attn_graph *g, const int32_t *inputs,
                               const int32_t *labels, int64_t batch, int64_t length,
                               const attn_tensor *logits, double *sum) {
  int64_t rows = batch * length;
  attn_graph_reset(g, false);
  int32_t *index = attn_arena_alloc(g->arena, (size_t)rows * sizeof *index);
  bool *hit = attn_arena_alloc(g->arena, (size_t)rows * sizeof *hit);
  if (!index || !hit) return ATTN_OUT_OF_MEMORY;
  int64_t count = find_labelled(labels, rows, index);
  attn_layout layout = attn_layout_equal(batch, length);
  attn_var *hidden = attn_decoder_hidden(g, model, &layout, inputs, NULL, 0, 0);
  ATTN_TRY(attn_graph_status(g));
  for (int64_t first = 0; first < count; first += logits->shape[0]) {
    int64_t some = count - first < logits->shape[0] ? count - first : logits->shape[0];
    ATTN_TRY(judge(model, g, hidden, index + first, some, labels, logits, hit + first));
  }
  for (int64_t b = 0, i = 0; b < batch; ++b) {
    int64_t own = 0, hits = 0;
    for (; i < count && index[i] < (b + 1) * length; ++i, ++own) hits += hit[i];
    if (own) *sum += (double)hits / (double)own;
  }
  return ATTN_OK;
}

attn_status attn_model_accuracy(const attn_model *model, const int32_t *inputs,
                                const int32_t *labels, int64_t count, int64_t length,
                                double *accuracy) {
  enum { ROWS = 4096, LOGITS = 1 << 22 }; /* that are held at once */
  int64_t vocabulary = model->config.vocabulary;
  int64_t shape[2] = {LOGITS / vocabulary > 1 ? LOGITS / vocabulary : 1, vocabulary};
  int64_t step = ROWS / length > 1 ? ROWS / length : 1;
  attn_graph *graph;
  attn_tensor logits = {0};
  double sum = 0;
  ATTN_TRY(attn_model_check_decoder(model, "accuracy"));
  ATTN_TRY(attn_graph_create_on(model->device, model->compute, &graph));
  attn_status status = attn_tensor_create(ATTN_F32, 2, shape, &logits);
  for (int64_t first = 0; first < count && status == ATTN_OK; first += step) {
    int64_t batch = count - first < step ? count - first : step;
    status = judge_batch(model, graph, inputs + first * length, labels + first * length, batch,
                         length, &logits, &sum);
  }
  attn_tensor_destroy(&logits);
  attn_graph_destroy(graph);
  *accuracy = count ? sum / (double)count : 0;
  return status;
}
