/* Perplexity: the mean loss over a text, window by window. */
#include "base/memory.h"
#include "base/status.h"
#include "graph/operations.h"
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
