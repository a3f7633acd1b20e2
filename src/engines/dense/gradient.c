/* dW (+)= dY^T X by the tile kernels, for bfloat16: the gradient of a weight.
 *
 * The depth of this product is the tokens, by which neither operand is laid out, so both are
 * rearranged: X is packed as the right-hand matrix, dY transposed as the left-hand one. That is
 * done for a piece of the tokens at a time, and for dY by the thread that needs it just before it
 * does, so that both stay in the caches until the product. Each element of dW is summed by one
 * thread in the order of the tokens, so neither threads nor tasks change a bit. */
#include "engines/dense/product.h"
#include "kernels/kernels.h"

enum {
  PIECE_ROWS = 512, /* tokens that are rearranged together */
  PRODUCT_DEPTH =
      256, /* tokens of a product: 32 rows of dY^T and two panels stay in the L1 cache */
  PACK_ROWS = 2 * ATTN_BF16_DEPTH,
  TASK_OUTPUTS = 64,
  LEAST_OUTPUTS = 32, /* of a task: two AMX tiles */
  LEAST_INPUTS = 4 * ATTN_PANEL,
  GAP = 32, /* keeps rows of dY^T off the same lines of the cache */
};

/* How dW is cut into tasks: each of `outputs` rows and `inputs` columns. */
typedef struct cut {
  int64_t outputs, inputs, down, across;
} cut;

static int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static int64_t pieces_of(int64_t whole, int64_t part) {
  return (whole + part - 1) / part;
}

/* As large as possible with a task for each thread. */
static cut choose_cut(int64_t outputs, int64_t inputs, int threads) {
  cut c = {.outputs = TASK_OUTPUTS, .inputs = inputs};
  if (pieces_of(outputs, c.outputs) < threads) c.outputs = LEAST_OUTPUTS;
  c.down = pieces_of(outputs, c.outputs);
  while (c.down * pieces_of(inputs, c.inputs) < threads && c.inputs >= 2 * LEAST_INPUTS)
    c.inputs = pieces_of(c.inputs, 2 * ATTN_PANEL) * ATTN_PANEL;
  c.across = pieces_of(inputs, c.inputs);
  return c;
}

static const uint16_t *at(const attn_matrix *matrix, int64_t row, int64_t column) {
  return (const uint16_t *)matrix->data + row * matrix->stride[0] + column;
}

/* Asks for the sums that will be added to: all gradients together are larger than the L2 cache. */
static void claim(const float *sums, int64_t stride, int64_t rows, int64_t columns) {
  enum { LINE = 16 };
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += LINE) __builtin_prefetch(sums + i * stride + j, 1, 2);
}

/* One task of one piece, the tokens first .. first + depth - 1. */
static void multiply_task(const attn_kernels *kernels, const attn_matrix *dy,
                          const uint16_t *packed, int64_t panel_stride, const attn_matrix *dw,
                          const cut *c, int64_t task, int64_t first, int64_t depth,
                          bool accumulate) {
  uint16_t left[TASK_OUTPUTS * (PIECE_ROWS + GAP)] __attribute__((aligned(64)));
  int64_t output = task % c->down * c->outputs, input = task / c->down * c->inputs;
  int64_t outputs = min(dw->rows - output, c->outputs);
  int64_t inputs = min(dw->columns - input, c->inputs);
  float *to = (float *)dw->data + output * dw->stride[0] + input;
  claim(to, dw->stride[0], outputs, inputs);
  kernels->recurrent_transpose_bf16(left, PIECE_ROWS + GAP, at(dy, first, output), dy->stride[0],
                                    depth, outputs, attn_packed_depth_bf16(depth), NULL, 0);
  const uint16_t *right = packed + input / ATTN_PANEL * panel_stride;
  for (int64_t start = 0; start < depth; start += PRODUCT_DEPTH)
    kernels->matmul_bf16(outputs, inputs, min(depth - start, PRODUCT_DEPTH), left + start,
                         PIECE_ROWS + GAP, right + start * ATTN_PANEL, panel_stride, to,
                         dw->stride[0], accumulate || start > 0);
}

attn_status attn_gradient_by_tiles(const attn_matrix *dy, const attn_matrix *x,
                                   const attn_matrix *dw, bool accumulate, attn_arena *scratch) {
  const attn_kernels *kernels = attn_kernels_get();
  int64_t tokens = x->rows, longest = attn_packed_depth_bf16(min(tokens, PIECE_ROWS));
  int64_t panel_stride = longest * ATTN_PANEL;
  int threads = attn_product_threads(dw->rows, dw->columns, tokens);
  cut c = choose_cut(dw->rows, dw->columns, threads);
  attn_arena_mark mark = attn_arena_get_mark(scratch);
  uint16_t *packed =
      attn_arena_alloc(scratch, (size_t)(attn_panels(x->columns) * panel_stride) * sizeof *packed);
  if (!packed) return ATTN_OUT_OF_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    kernels->begin();
    for (int64_t first = 0; first < tokens; first += PIECE_ROWS) {
      int64_t depth = min(tokens - first, PIECE_ROWS);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < depth; row += PACK_ROWS)
        kernels->pack_bf16(packed + row * ATTN_PANEL, panel_stride, at(x, first + row, 0),
                           min(depth - row, PACK_ROWS), x->columns, x->stride[0], 1);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < c.down * c.across; ++task)
        multiply_task(kernels, dy, packed, panel_stride, dw, &c, task, first, depth,
                      accumulate || first > 0);
    }
    kernels->end();
  }
  attn_arena_release(scratch, mark);
  return ATTN_OK;
}
