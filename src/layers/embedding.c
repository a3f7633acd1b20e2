#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

typedef struct embedding_node {
  attn_node node;
  attn_parameter *table;
  const int32_t *tokens; /* as the device has them */
  double factor;
} embedding_node;

/* d table[token] += factor dy */
static attn_status embedding_backward(attn_graph *g, attn_node *node) {
  embedding_node *self = (embedding_node *)node;
  attn_pass_scatter_add(g, &self->table->gradient, self->factor, &node->output->gradient,
                        self->tokens);
  return g->status;
}

/* From a quantised table, which has no gradient: unpacked row by row. */
static bool look_up_blocks(attn_graph *g, const attn_parameter *table, const int32_t *tokens,
                           int64_t rows, double factor, const attn_tensor *value) {
  int64_t width = table->value.shape[1];
  attn_graph_mark mark = attn_graph_get_mark(g);
  attn_tensor row = attn_graph_tensor(g, ATTN_F32, 1, &width);
  for (int64_t r = 0; r < rows && row.data; ++r) {
    attn_status status = attn_parameter_row(table, tokens[r], row.data);
    if (status != ATTN_OK) {
      attn_graph_error(g, status);
      return false;
    }
    g->kernels->row_add(attn_row(value, width, r), factor, attn_row(&row, width, 0), 0,
                        (attn_span){0}, width);
  }
  attn_graph_release(g, mark);
  return row.data != NULL;
}

attn_var *attn_layer_embedding(attn_graph *graph, attn_parameter *table, const int32_t *tokens,
                               int64_t rows, double factor) {
  if (table->value.rank != 2)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "embedding: the table has rank %d, not 2",
                           table->value.rank);
  attn_var *rows_of = NULL;
  if (!table->blocks) {
    rows_of = attn_graph_parameter(graph, table); /* checks what the table holds */
    if (!rows_of) return NULL;
  }
  int64_t vocabulary = table->value.shape[0], width = table->value.shape[1];
  for (int64_t r = 0; r < rows; ++r)
    if (tokens[r] < 0 || tokens[r] >= vocabulary)
      return attn_graph_fail(graph, ATTN_INVALID_ARGUMENT, "token %d at %lld is not in 0 to %lld",
                             tokens[r], (long long)r, (long long)vocabulary - 1);
  attn_tensor value = attn_graph_tensor(graph, graph->wide, 2, (int64_t[]){rows, width});
  if (!value.data) return NULL;
  if (table->blocks) {
    if (graph->gpu)
      attn_pass_expand_blocks(graph, &value, factor, table, tokens);
    else if (!look_up_blocks(graph, table, tokens, rows, factor, &value))
      return NULL;
    return graph->status == ATTN_OK ? attn_graph_result(graph, value, 0, NULL) : NULL;
  }
  tokens = attn_pass_live(graph, tokens, (size_t)rows * sizeof *tokens);
  if (!tokens) return NULL;
  attn_pass_gather(graph, &value, factor, &table->value, tokens);
  attn_var *y = attn_graph_result(graph, value, 1, &rows_of);
  embedding_node *node = attn_graph_record(graph, sizeof *node, y, embedding_backward);
  if (node) {
    node->table = table;
    node->tokens = tokens;
    node->factor = factor;
  }
  return y;
}
