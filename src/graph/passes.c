#include "graph/passes.h"
#include "graph/operations.h"
#include "graph/replay.h"

#include <math.h>
#include <string.h>

/* Runs `call`, a function of the module, when the graph is on a GPU, and returns. */
#define ON_GPU(g, call)                                                                            \
  if ((g)->gpu) {                                                                                  \
    if ((g)->status != ATTN_OK) return;                                                            \
    attn_status gpu_status = attn_gpu_check((g)->gpu, (g)->gpu->cuda->call);                       \
    if (gpu_status != ATTN_OK) attn_graph_error((g), gpu_status);                                  \
    return;                                                                                        \
  }

#define PRAGMA(text) _Pragma(#text)
#define FOR_ROWS(g, x)                                                                             \
  const int64_t rows = attn_rows(x), width = (x)->rank ? (x)->shape[(x)->rank - 1] : 1;            \
  PRAGMA(omp parallel for num_threads(g->threads) schedule(static)                                 \
         if (rows * width > ATTN_SERIAL_ELEMENTS))                                                 \
  for (int64_t r = 0; r < rows; ++r)

/* Where the rows of a tensor are: `stride` elements apart, or (-1) by its axes. */
typedef struct row_walk {
  const attn_tensor *tensor;
  int64_t stride;
} row_walk;

static row_walk walk(const attn_tensor *tensor) {
  if (!tensor) return (row_walk){0};
  return (row_walk){tensor, attn_row_stride(tensor)};
}

static attn_span at(row_walk w, int64_t r) {
  if (!w.tensor) return (attn_span){0};
  if (w.stride >= 0) return attn_row(w.tensor, w.stride, r);
  int64_t offset = 0;
  for (int i = w.tensor->rank - 2; i >= 0; --i) {
    offset += r % w.tensor->shape[i] * w.tensor->stride[i];
    r /= w.tensor->shape[i];
  }
  return attn_row(w.tensor, 1, offset);
}

/* A row that is the same for all rows: a weight, a bias. */
static attn_span whole(const attn_tensor *tensor) {
  return tensor ? (attn_span){tensor->data, tensor->dtype} : (attn_span){0};
}

static attn_span further(attn_span span, int64_t elements) {
  span.data = (char *)span.data + (size_t)elements * attn_dtype_size(span.dtype);
  return span;
}

/* Columns that one thread takes where rows are summed. */
enum { SLICE = 64 };

/* One number of any dtype. */
static double number(const attn_graph *g, attn_span x) {
  double one = 1;
  return g->kernels->row_dot(x, (attn_span){&one, ATTN_F64}, 1);
}

void attn_pass_add(attn_graph *g, const attn_tensor *y, double alpha, const attn_tensor *a,
                   double beta, const attn_tensor *b) {
  ON_GPU(g, add(y, alpha, a, beta, b, attn_gpu_stream(g->gpu)))
  row_walk to = walk(y), from_a = walk(a), from_b = walk(b);
  FOR_ROWS(g, y) g->kernels->row_add(at(to, r), alpha, at(from_a, r), beta, at(from_b, r), width);
}

void attn_pass_multiply_sum(attn_graph *g, const attn_tensor *y, bool accumulate, int count,
                            const attn_tensor *a, const attn_tensor *b) {
  if (g->gpu && count > ATTN_CUDA_TERMS) {
    attn_pass_multiply_sum(g, y, accumulate, ATTN_CUDA_TERMS, a, b);
    attn_pass_multiply_sum(g, y, true, count - ATTN_CUDA_TERMS, a + ATTN_CUDA_TERMS,
                           b + ATTN_CUDA_TERMS);
    return;
  }
  ON_GPU(g, multiply_sum(y, accumulate, count, a, b, attn_gpu_stream(g->gpu)))
  row_walk to = walk(y), from_a[ATTN_PASS_TERMS], from_b[ATTN_PASS_TERMS];
  for (int j = 0; j < count; ++j) {
    from_a[j] = walk(&a[j]);
    from_b[j] = walk(&b[j]);
  }
  FOR_ROWS(g, y) {
    attn_span left[ATTN_PASS_TERMS], right[ATTN_PASS_TERMS];
    for (int j = 0; j < count; ++j) {
      left[j] = at(from_a[j], r);
      right[j] = at(from_b[j], r);
    }
    g->kernels->row_multiply_sum(at(to, r), accumulate, left, right, count, width);
  }
}

void attn_pass_rotate(attn_graph *g, const attn_tensor *y, bool accumulate, const attn_tensor *x,
                      const attn_tensor *cosines, const attn_tensor *sines, double direction) {
  ON_GPU(g, rotate(y, accumulate, x, cosines, sines, direction, attn_gpu_stream(g->gpu)))
  const int64_t half = cosines->shape[cosines->rank - 1];
  row_walk to = walk(y), from = walk(x), cosine = walk(cosines), sine = walk(sines);
  FOR_ROWS(g, y)
  g->kernels->row_rotate(at(to, r), accumulate, at(from, r), at(cosine, r), at(sine, r), direction,
                         half, width);
}

void attn_pass_convolve(attn_graph *g, const attn_tensor *y, bool accumulate, const attn_tensor *x,
                        const attn_tensor *w, const attn_tensor *tail, bool reverse) {
  ON_GPU(g, convolve(y, accumulate, x, w, tail, reverse, attn_gpu_stream(g->gpu)))
  attn_graph_fail(g, ATTN_INTERNAL, "convolve: a pass of GPUs");
}

/* s with the axes of `like`, repeated along those that it lacks at the end. */
static attn_tensor repeated(const attn_tensor *s, const attn_tensor *like) {
  attn_tensor view = *s;
  view.rank = like->rank;
  for (int i = 0; i < like->rank; ++i) {
    bool has = i < s->rank && s->shape[i] == like->shape[i];
    view.shape[i] = like->shape[i];
    view.stride[i] = has ? s->stride[i] : 0;
  }
  return view;
}

void attn_pass_scale_rows(attn_graph *g, const attn_tensor *y, bool accumulate,
                          const attn_tensor *s, const attn_tensor *x) {
  attn_tensor factors = repeated(s, y);
  factors.shape[y->rank - 1] = y->shape[y->rank - 1];
  factors.stride[y->rank - 1] = 0;
  ON_GPU(g, multiply_sum(y, accumulate, 1, x, &factors, attn_gpu_stream(g->gpu)))
  row_walk to = walk(y), from = walk(x), by = walk(&factors);
  FOR_ROWS(g, y) {
    attn_span target = at(to, r);
    g->kernels->row_add(target, number(g, at(by, r)), at(from, r), accumulate ? 1 : 0,
                        accumulate ? target : (attn_span){0}, width);
  }
}

void attn_pass_scale_by(attn_graph *g, const attn_tensor *y, bool accumulate, const attn_tensor *s,
                        const attn_tensor *x) {
  attn_tensor factor = *y;
  factor.data = s->data;
  factor.dtype = s->dtype;
  memset(factor.stride, 0, sizeof factor.stride);
  ON_GPU(g, multiply_sum(y, accumulate, 1, x, &factor, attn_gpu_stream(g->gpu)))
  attn_add_tensor(g, y, x, number(g, whole(s)), accumulate);
}

void attn_pass_activate(attn_graph *g, attn_activation f, const attn_tensor *y,
                        const attn_tensor *x) {
  ON_GPU(g, activate(f, y, x, attn_gpu_stream(g->gpu)))
  row_walk to = walk(y), from = walk(x);
  FOR_ROWS(g, y) g->kernels->row_activate(f, at(to, r), at(from, r), width);
}

void attn_pass_activate_backward(attn_graph *g, attn_activation f, const attn_tensor *dx,
                                 bool accumulate, const attn_tensor *x, const attn_tensor *dy) {
  ON_GPU(g, activate_backward(f, dx, accumulate, x, dy, attn_gpu_stream(g->gpu)))
  row_walk to = walk(dx), from = walk(x), upstream = walk(dy);
  FOR_ROWS(g, dx)
  g->kernels->row_activate_backward(f, at(to, r), accumulate, at(from, r), at(upstream, r), width);
}

void attn_pass_gate(attn_graph *g, attn_activation f, const attn_tensor *y, const attn_tensor *a,
                    const attn_tensor *b) {
  ON_GPU(g, gate(f, y, a, b, attn_gpu_stream(g->gpu)))
  row_walk to = walk(y), from_a = walk(a), from_b = walk(b);
  FOR_ROWS(g, y) g->kernels->row_gate(f, at(to, r), at(from_a, r), at(from_b, r), width);
}

void attn_pass_gate_backward(attn_graph *g, attn_activation f, const attn_tensor *da,
                             bool accumulate_a, const attn_tensor *db, bool accumulate_b,
                             const attn_tensor *y, const attn_tensor *a, const attn_tensor *b,
                             const attn_tensor *dy) {
  ON_GPU(g,
         gate_backward(f, da, accumulate_a, db, accumulate_b, y, a, b, dy, attn_gpu_stream(g->gpu)))
  row_walk to_a = walk(da), to_b = walk(db), from_a = walk(a), from_b = walk(b);
  row_walk upstream = walk(dy);
  FOR_ROWS(g, dy)
  g->kernels->row_gate_backward(f, at(to_a, r), accumulate_a, at(to_b, r), accumulate_b,
                                at(from_a, r), at(from_b, r), at(upstream, r), width);
  if (y) attn_pass_gate(g, f, y, a, b);
}

void attn_pass_softmax(attn_graph *g, const attn_tensor *y, const attn_tensor *x, bool divide,
                       double floor) {
  ON_GPU(g, row_softmax(y, x, divide, floor, attn_gpu_stream(g->gpu)))
  row_walk to = walk(y), from = walk(x);
  FOR_ROWS(g, y) g->kernels->row_softmax(at(to, r), at(from, r), width, divide, floor);
}

void attn_pass_softmax_backward(attn_graph *g, const attn_tensor *dx, bool accumulate,
                                const attn_tensor *x, const attn_tensor *dy, bool divide,
                                double floor) {
  ON_GPU(g, row_softmax_backward(dx, accumulate, x, dy, divide, floor, attn_gpu_stream(g->gpu)))
  row_walk to = walk(dx), from = walk(x), upstream = walk(dy);
  FOR_ROWS(g, dx)
  g->kernels->row_softmax_backward(at(to, r), accumulate, at(from, r), at(upstream, r), width,
                                   divide, floor);
}

void attn_pass_cap(attn_graph *g, const attn_tensor *x, double cap) {
  ON_GPU(g, cap(x, cap, attn_gpu_stream(g->gpu)))
  int64_t count = attn_tensor_count(x);
#pragma omp parallel for num_threads(g->threads) schedule(static) if (count > ATTN_SERIAL_ELEMENTS)
  for (int64_t i = 0; i < count; ++i)
    if (x->dtype == ATTN_F64)
      ((double *)x->data)[i] = cap * tanh(((double *)x->data)[i] / cap);
    else
      ((float *)x->data)[i] = (float)cap * tanhf(((float *)x->data)[i] / (float)cap);
}

/* Element r of a tensor in row-major order := value. */
static void put(const attn_tensor *y, int64_t r, double value) {
  attn_tensor as_row = *y; /* with an innermost axis of one element */
  as_row.rank = y->rank + 1;
  as_row.shape[y->rank] = as_row.stride[y->rank] = 1;
  attn_tensor element = {.data = at(walk(&as_row), r).data, .dtype = y->dtype};
  (void)attn_tensor_fill(&element, value);
}

void attn_pass_row_dot(attn_graph *g, const attn_tensor *y, const attn_tensor *a,
                       const attn_tensor *b) {
  ON_GPU(g, row_dot(y, a, b, attn_gpu_stream(g->gpu)))
  row_walk from_a = walk(a), from_b = walk(b);
  FOR_ROWS(g, a) put(y, r, g->kernels->row_dot(at(from_a, r), at(from_b, r), width));
}

/* Scratch of `count` float64 on the device. */
static void *scratch(attn_graph *g, int64_t count) {
  void *memory = attn_arena_alloc(g->memory, (size_t)count * sizeof(double));
  return memory ? memory : attn_graph_error(g, ATTN_OUT_OF_MEMORY);
}

void attn_pass_column_dot(attn_graph *g, const attn_tensor *y, const attn_tensor *a,
                          const attn_tensor *b) {
  if (g->gpu) {
    attn_graph_mark mark = attn_graph_get_mark(g);
    void *workspace = scratch(g, ATTN_CUDA_PARTS * y->shape[0]);
    attn_status status =
        workspace ? attn_gpu_check(g->gpu, g->gpu->cuda->column_dot(y, false, a, b, workspace,
                                                                    attn_gpu_stream(g->gpu)))
                  : g->status;
    attn_graph_release(g, mark);
    if (status != ATTN_OK) attn_graph_error(g, status);
    return;
  }
  attn_status status = attn_tensor_fill(y, 0);
  if (status != ATTN_OK) attn_graph_error(g, status);
  row_walk from_a = walk(a), from_b = walk(b);
  int64_t rows = attn_rows(a), width = a->shape[a->rank - 1];
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (rows * width > ATTN_SERIAL_ELEMENTS)
  for (int64_t start = 0; start < width; start += SLICE) {
    int64_t count = width - start < SLICE ? width - start : SLICE;
    attn_span to = further(whole(y), start);
    for (int64_t r = 0; r < rows; ++r) { /* threads share the columns: the sum has one order */
      attn_span left = further(at(from_a, r), start);
      if (b) {
        attn_span right = further(at(from_b, r), start);
        g->kernels->row_multiply_sum(to, true, &left, &right, 1, count);
      } else {
        g->kernels->row_add(to, 1, to, 1, left, count);
      }
    }
  }
}

/* Norms -----------------------------------------------------------------------------------------
 */

static double *numbers(const attn_tensor *tensor) {
  return tensor ? tensor->data : NULL;
}

void attn_pass_norm(attn_graph *g, const attn_pass_norm_options *o, const attn_tensor *y,
                    const attn_tensor *x) {
  double *factor = numbers(o->factor), *mean = numbers(o->mean);
  ON_GPU(g, norm(y, x, o->weight, o->bias, o->divisor, o->epsilon, factor, mean,
                 attn_gpu_stream(g->gpu)))
  attn_span w = whole(o->weight), b = whole(o->bias);
  row_walk to = walk(y), from = walk(x);
  FOR_ROWS(g, x)
  factor[r] =
      mean ? g->kernels->row_layer_norm(at(to, r), at(from, r), w, b, width, o->epsilon, &mean[r])
           : g->kernels->row_rms_norm(at(to, r), at(from, r), w, width, o->divisor, o->epsilon);
}

void attn_pass_add_norm(attn_graph *g, const attn_pass_norm_options *o, const attn_tensor *sum,
                        const attn_tensor *y, const attn_tensor *a, const attn_tensor *b) {
  double *factor = numbers(o->factor);
  if (!o->mean)
    ON_GPU(g, add_norm(sum, y, a, b, o->weight, o->divisor, o->epsilon, factor,
                       attn_gpu_stream(g->gpu)))
  attn_pass_add(g, sum, 1, a, 1, b);
  attn_pass_norm(g, o, y, sum);
}

/* Rows of vectors of 16 bytes: what the kernel of norm_gate reads (kernels/cuda/rows.h). */
static bool has_vectors(const attn_tensor *x) {
  int last = x->rank - 1;
  int64_t size = (int64_t)attn_dtype_size(x->dtype), most = 4096;
  bool whole = last >= 0 && x->dtype != ATTN_F64 && x->stride[last] == 1 &&
               x->shape[last] % 8 == 0 && x->shape[last] <= most && (uintptr_t)x->data % 16 == 0;
  for (int i = 0; i < last; ++i) whole = whole && x->stride[i] * size % 16 == 0;
  return whole;
}

bool attn_pass_can_gate_norm(const attn_graph *g, const attn_tensor *x, const attn_tensor *gate) {
  return g->gpu && has_vectors(x) && has_vectors(gate);
}

void attn_pass_norm_gate(attn_graph *g, const attn_pass_norm_options *o, const attn_tensor *y,
                         const attn_tensor *x, const attn_tensor *gate) {
  double *factor = numbers(o->factor);
  ON_GPU(g, norm_gate(y, x, gate, o->divisor, o->epsilon, factor, attn_gpu_stream(g->gpu)))
}

void attn_pass_norm_gate_backward(attn_graph *g, const attn_pass_norm_options *o,
                                  const attn_tensor *dx, bool accumulate, const attn_tensor *d_gate,
                                  bool accumulate_gate, const attn_tensor *x,
                                  const attn_tensor *gate, const attn_tensor *dy) {
  const double *factor = numbers(o->factor);
  ON_GPU(g, norm_gate_backward(dx, accumulate, d_gate, accumulate_gate, x, gate, dy, o->divisor,
                               factor, attn_gpu_stream(g->gpu)))
}

static void norm_backward_on_gpu(attn_graph *g, const attn_pass_norm_options *o,
                                 const attn_tensor *dx, bool accumulate, const attn_tensor *copy,
                                 const attn_tensor *d_weight, const attn_tensor *d_bias,
                                 const attn_tensor *x, const attn_tensor *dy) {
  attn_graph_mark mark = attn_graph_get_mark(g);
  bool sums = d_weight || d_bias;
  void *workspace = sums ? scratch(g, 2 * ATTN_CUDA_PARTS * x->shape[x->rank - 1]) : NULL;
  attn_status status = g->status;
  if (status == ATTN_OK)
    status = attn_gpu_check(
        g->gpu, g->gpu->cuda->norm_backward(dx, accumulate, copy, d_weight, d_bias, x, o->weight,
                                            dy, o->divisor, numbers(o->factor), numbers(o->mean),
                                            workspace, attn_gpu_stream(g->gpu)));
  attn_graph_release(g, mark);
  if (status != ATTN_OK) attn_graph_error(g, status);
}

/* Weight gradients are sums over rows: each of a fixed number of parts is summed by one thread in
 * row order, then the parts in their order, so that the result depends on nothing else. */
enum { PARTS = 16 };

void attn_pass_norm_backward(attn_graph *g, const attn_pass_norm_options *o, const attn_tensor *dx,
                             bool accumulate, const attn_tensor *copy, const attn_tensor *d_weight,
                             const attn_tensor *d_bias, const attn_tensor *x,
                             const attn_tensor *dy) {
  if (g->gpu) {
    norm_backward_on_gpu(g, o, dx, accumulate, copy, d_weight, d_bias, x, dy);
    return;
  }
  const attn_tensor *const targets[2] = {d_weight, d_bias};
  const double *factor = numbers(o->factor), *mean = numbers(o->mean);
  int64_t rows = attn_rows(x), width = x->shape[x->rank - 1];
  attn_span weight = whole(o->weight);
  row_walk to = walk(dx), from = walk(x), upstream = walk(dy);
  attn_tensor parts = {0};
  if (d_weight || d_bias) {
    parts = attn_graph_tensor(g, g->wide, 3, (int64_t[]){PARTS, 2, width});
    if (!parts.data) return;
    memset(parts.data, 0, (size_t)(PARTS * 2 * width) * attn_dtype_size(parts.dtype));
  }
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (rows * width > ATTN_SERIAL_ELEMENTS)
  for (int64_t part = 0; part < PARTS; ++part) {
    attn_span sums[2] = {{0}};
    for (int i = 0; i < 2; ++i)
      if (targets[i]) sums[i] = attn_row(&parts, width, 2 * part + i);
    for (int64_t r = rows * part / PARTS; r < rows * (part + 1) / PARTS; ++r)
      if (mean)
        g->kernels->row_layer_norm_backward(at(to, r), accumulate, sums[0], sums[1], at(from, r),
                                            weight, at(upstream, r), width, mean[r], factor[r]);
      else
        g->kernels->row_rms_norm_backward(at(to, r), accumulate, sums[0], at(from, r), weight,
                                          at(upstream, r), width, o->divisor, factor[r]);
  }
  for (int i = 0; i < 2; ++i) {
    if (!targets[i]) continue;
    attn_span sum = attn_row(&parts, width, i);
    for (int64_t part = 1; part < PARTS; ++part)
      g->kernels->row_add(sum, 1, sum, 1, attn_row(&parts, width, 2 * part + i), width);
    g->kernels->row_add(whole(targets[i]), 1, sum, 0, (attn_span){0}, width);
  }
  if (copy) attn_add_tensor(g, copy, dx, 1, false);
}

/* The loss --------------------------------------------------------------------------------------
 */

void attn_pass_cross_entropy(attn_graph *g, const attn_tensor *z, const int32_t *targets,
                             double scale, const attn_tensor *dz, const attn_tensor *losses) {
  double *loss = losses->data;
  const attn_tensor *apart = dz->data == z->data && dz->dtype == z->dtype ? NULL : dz;
  ON_GPU(g, cross_entropy(z, targets, scale, apart, loss, attn_gpu_stream(g->gpu)))
  row_walk from = walk(z);
  FOR_ROWS(g, z) {
    attn_span row = at(from, r);
    loss[r] = 0;
    if (targets[r] >= 0)
      loss[r] = g->kernels->row_cross_entropy(row, width, targets[r], scale);
    else /* whatever the logits are, infinite ones too */
      memset(row.data, 0, (size_t)width * attn_dtype_size(row.dtype));
  }
  if (apart) attn_add_tensor(g, dz, z, 1, false);
}

void attn_pass_total(attn_graph *g, const attn_tensor *sum, double scale,
                     const attn_tensor *values) {
  int64_t count = attn_tensor_count(values);
  const double *numbers_of = values->data;
  ON_GPU(g, total(numbers_of, count, scale, sum->data, sum->dtype, attn_gpu_stream(g->gpu)))
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += numbers_of[i];
  attn_status status = attn_tensor_fill(sum, total * scale);
  if (status != ATTN_OK) attn_graph_error(g, status);
}

/* Look-ups --------------------------------------------------------------------------------------
 */

void attn_pass_gather(attn_graph *g, const attn_tensor *y, double factor, const attn_tensor *table,
                      const int32_t *index) {
  ON_GPU(g, gather(y, factor, table, index, attn_gpu_stream(g->gpu)))
  row_walk to = walk(y), from = walk(table);
  FOR_ROWS(g, y) {
    if (index[r] >= 0)
      g->kernels->row_add(at(to, r), factor, at(from, index[r]), 0, (attn_span){0}, width);
    else
      memset(at(to, r).data, 0, (size_t)width * attn_dtype_size(y->dtype));
  }
}

static void scatter_on_gpu(attn_graph *g, const attn_tensor *table, double factor,
                           const attn_tensor *x, const int32_t *index) {
  attn_graph_mark mark = attn_graph_get_mark(g);
  void *workspace = scratch(g, (table->shape[0] + 2 + 2 * attn_rows(x)) / 2);
  attn_status status =
      workspace
          ? attn_gpu_check(g->gpu, g->gpu->cuda->scatter_add(table, factor, x, index, workspace,
                                                             attn_gpu_stream(g->gpu)))
          : g->status;
  attn_graph_release(g, mark);
  if (status != ATTN_OK) attn_graph_error(g, status);
}

/* Threads share the columns, so each sum runs in the order of r. */
void attn_pass_scatter_add(attn_graph *g, const attn_tensor *table, double factor,
                           const attn_tensor *x, const int32_t *index) {
  if (g->gpu) {
    scatter_on_gpu(g, table, factor, x, index);
    return;
  }
  int64_t rows = attn_rows(x), width = table->shape[1];
  row_walk from = walk(x), to = walk(table);
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (rows * width > ATTN_SERIAL_ELEMENTS)
  for (int64_t start = 0; start < width; start += SLICE) {
    int64_t count = width - start < SLICE ? width - start : SLICE;
    for (int64_t r = 0; r < rows; ++r) {
      attn_span target = further(at(to, index[r]), start);
      g->kernels->row_add(target, 1, target, factor, further(at(from, r), start), count);
    }
  }
}

void attn_pass_expand_blocks(attn_graph *g, const attn_tensor *y, double factor,
                             const attn_parameter *table, const int32_t *index) {
  if (index) index = attn_pass_live(g, index, (size_t)y->shape[0] * sizeof *index);
  if (g->status != ATTN_OK) return;
  attn_status status =
      attn_gpu_check(g->gpu, g->gpu->cuda->blocks_expand(table->block_type, table->blocks, index, y,
                                                         attn_gpu_stream(g->gpu)));
  if (status != ATTN_OK) attn_graph_error(g, status);
  if (factor != 1) attn_pass_add(g, y, factor, y, 0, NULL);
}

const void *attn_pass_upload(attn_graph *g, const void *host, size_t bytes) {
  if (!g->gpu) return host;
  char *memory = attn_arena_alloc(g->memory, bytes);
  if (!memory) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  for (size_t done = 0; done < bytes; done += ATTN_CUDA_STORE) {
    size_t piece = bytes - done < ATTN_CUDA_STORE ? bytes - done : ATTN_CUDA_STORE;
    if (bytes > 32 * ATTN_CUDA_STORE) piece = bytes; /* a copy that waits is quicker then */
    const void *from = (const char *)host + done;
    attn_status status =
        piece <= ATTN_CUDA_STORE
            ? g->gpu->cuda->store(g->device.index, memory + done, from, piece,
                                  attn_gpu_stream(g->gpu))
            : g->gpu->cuda->copy(g->device.index, memory, from, piece, attn_gpu_stream(g->gpu));
    status = attn_gpu_check(g->gpu, status);
    if (status != ATTN_OK) return attn_graph_error(g, status);
    if (piece == bytes) break;
  }
  return memory;
}

const void *attn_pass_live(attn_graph *g, const void *host, size_t bytes) {
  if (!g->replay) return attn_pass_upload(g, host, bytes);
  const void *memory = attn_replay_live(g->replay, host, bytes);
  return memory ? memory : attn_graph_error(g, ATTN_UNSUPPORTED);
}

attn_tensor attn_pass_numbers(attn_graph *g, attn_dtype dtype, int64_t count,
                              const double *numbers) {
  attn_tensor made = attn_graph_tensor(g, dtype, 1, &count), wide = made;
  const void *uploaded = attn_pass_upload(g, numbers, (size_t)count * sizeof *numbers);
  if (!made.data || !uploaded) return (attn_tensor){0};
  wide.data = (void *)(uintptr_t)uploaded;
  wide.dtype = ATTN_F64;
  if (g->gpu && dtype == ATTN_F64) return wide;
  attn_add_tensor(g, &made, &wide, 1, false);
  return g->status == ATTN_OK ? made : (attn_tensor){0};
}
