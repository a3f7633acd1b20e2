#include "graph/graph.h"
#include "engines/plan_cache.h"
#include "graph/operations.h"
#include "graph/passes.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* A gradient buffer that no variable needs any more, kept for the next one of its size. */
typedef struct attn_free_buffer {
  struct attn_free_buffer *next;
  void *memory;
  size_t size;
} attn_free_buffer;

/* Columns of a root's gradient that hold nothing yet; a list. */
typedef struct attn_columns {
  struct attn_columns *next;
  int64_t begin, end;
} attn_columns;

enum { FIRST_CHUNK = 1 << 20 };

attn_status attn_graph_create(attn_dtype compute, attn_graph **graph) {
  return attn_graph_create_on((attn_device){0}, compute, graph);
}

attn_status attn_graph_create_on(attn_device device, attn_dtype compute, attn_graph **graph) {
  if (compute != ATTN_F64 && compute != ATTN_F32 && compute != ATTN_BF16)
    return attn_fail(ATTN_UNSUPPORTED, "graph: cannot compute in %s; float64, float32 or bfloat16",
                     attn_dtype_name(compute));
  attn_graph *g = attn_alloc_zero(sizeof *g);
  if (!g) return ATTN_OUT_OF_MEMORY;
  g->device = device;
  g->gpu = attn_is_cuda(device) ? attn_gpu_open(device.index) : NULL;
  g->arena = attn_arena_create(FIRST_CHUNK);
  g->memory = g->gpu ? attn_device_arena(device, FIRST_CHUNK) : g->arena;
  g->plans = attn_plan_cache_create();
  bool lacks_gpu = attn_is_cuda(device) && !g->gpu;
  if (!g->arena || !g->memory || !g->plans || lacks_gpu) {
    attn_graph_destroy(g);
    return lacks_gpu ? ATTN_UNSUPPORTED : ATTN_OUT_OF_MEMORY;
  }
  g->compute = compute;
  g->wide = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  attn_graph_reset(g, false);
  *graph = g;
  return ATTN_OK;
}

void attn_graph_destroy(attn_graph *graph) {
  if (!graph) return;
  if (graph->memory != graph->arena) attn_arena_destroy(graph->memory);
  attn_arena_destroy(graph->arena);
  attn_plan_cache_destroy(graph->plans);
  attn_free(graph);
}

void attn_graph_reserve(attn_graph *graph, size_t bytes) {
  (void)attn_arena_reserve(graph->memory, bytes);
}

void attn_graph_reset(attn_graph *graph, bool recording) {
  attn_arena_reset(graph->arena);
  attn_arena_reset(graph->memory);
  graph->recording = recording;
  graph->status = ATTN_OK;
  graph->used_up = false;
  graph->expected = 0;
  graph->loss = NULL;
  graph->last = NULL;
  graph->free_buffers = NULL;
  graph->kernels = attn_kernels_get();
  graph->threads = attn_get_threads();
}

void attn_graph_expect(attn_graph *graph, double scale) {
  graph->expected = scale;
}

attn_status attn_graph_status(const attn_graph *graph) {
  return graph->status;
}

void *attn_graph_error(attn_graph *graph, attn_status status) {
  if (graph->status == ATTN_OK) graph->status = status;
  return NULL;
}

void *attn_graph_fail(attn_graph *graph, attn_status status, const char *format, ...) {
  if (graph->status != ATTN_OK) return NULL; /* keep the first message */
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return attn_graph_error(graph, attn_fail(status, "%s", message));
}

attn_graph_mark attn_graph_get_mark(const attn_graph *graph) {
  return (attn_graph_mark){attn_arena_get_mark(graph->arena), attn_arena_get_mark(graph->memory)};
}

void attn_graph_release(attn_graph *graph, attn_graph_mark mark) {
  attn_arena_release(graph->arena, mark.host);
  attn_arena_release(graph->memory, mark.device);
}

/* Of the device. */
static void *allocate_values(attn_graph *g, size_t size) {
  void *memory = attn_arena_alloc(g->memory, size);
  return memory ? memory : attn_graph_error(g, ATTN_OUT_OF_MEMORY);
}

static void *allocate(attn_graph *g, size_t size) {
  void *memory = attn_arena_alloc(g->arena, size);
  return memory ? memory : attn_graph_error(g, ATTN_OUT_OF_MEMORY);
}

static attn_var *new_var(attn_graph *g, attn_tensor value, bool needs_gradient) {
  if (g->status != ATTN_OK) return NULL; /* the value's memory may be what could not be had */
  attn_var *var = allocate(g, sizeof *var);
  if (var) *var = (attn_var){.value = value, .needs_gradient = needs_gradient};
  return var;
}

/* Values that come from outside: the row kernels know three dtypes. */
static bool check_value(attn_graph *g, const char *what, const attn_tensor *value) {
  char text[128];
  if (value->dtype != ATTN_F64 && value->dtype != ATTN_F32 && value->dtype != ATTN_BF16)
    attn_graph_fail(g, ATTN_UNSUPPORTED, "%s: the dtype is %s, expected %s", what,
                    attn_dtype_name(value->dtype), "float64, float32 or bfloat16");
  else if (!attn_same_device(value->device, g->device))
    attn_graph_fail(g, ATTN_INVALID_ARGUMENT, "%s: the tensor %s is on another device", what,
                    attn_shape_text(value, text));
  else if (!value->data && attn_tensor_count(value) > 0)
    attn_graph_fail(g, ATTN_INVALID_ARGUMENT, "%s: the tensor %s has no data", what,
                    attn_shape_text(value, text));
  return g->status == ATTN_OK;
}

attn_var *attn_graph_input(attn_graph *graph, const attn_tensor *value) {
  return check_value(graph, "input", value) ? new_var(graph, *value, false) : NULL;
}

attn_var *attn_graph_leaf(attn_graph *graph, const attn_tensor *value) {
  if (!check_value(graph, "leaf", value)) return NULL;
  if (!attn_tensor_is_contiguous(value)) /* the gradient is, and views are taken of both alike */
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "leaf: the tensor is not contiguous");
  return new_var(graph, *value, graph->recording);
}

attn_var *attn_graph_parameter(attn_graph *graph, attn_parameter *parameter) {
  bool trains = graph->recording && parameter->gradient.data;
  if (!check_value(graph, parameter->name ? parameter->name : "parameter", &parameter->value))
    return NULL;
  attn_var *var = new_var(graph, parameter->value, trains);
  if (var && trains) var->gradient = parameter->gradient; /* holds a sum from the start */
  return var;
}

static size_t bytes_of(const attn_tensor *value) {
  return (size_t)attn_tensor_count(value) * attn_dtype_size(value->dtype);
}

/* A tensor whose memory `allocate_from` gives; no data after an error. */
static attn_tensor make_tensor(attn_graph *g, attn_dtype dtype, int rank, const int64_t *shape,
                               void *(*allocate_from)(attn_graph *g, size_t size)) {
  attn_tensor tensor;
  attn_status status = attn_tensor_wrap(NULL, dtype, rank, shape, &tensor);
  if (status != ATTN_OK) {
    attn_graph_error(g, status);
    return (attn_tensor){0};
  }
  tensor.device = g->device;
  tensor.data = allocate_from(g, bytes_of(&tensor));
  return tensor;
}

attn_tensor attn_graph_tensor(attn_graph *graph, attn_dtype dtype, int rank, const int64_t *shape) {
  return make_tensor(graph, dtype, rank, shape, allocate_values);
}

static attn_var *root_of(attn_var *x) {
  return x->root ? x->root : x;
}

attn_var *attn_graph_result(attn_graph *graph, attn_tensor value, int inputs,
                            attn_var *const *input) {
  bool needs_gradient = false;
  for (int i = 0; i < inputs; ++i) {
    if (!input[i]) continue;
    needs_gradient |= input[i]->needs_gradient;
    ++root_of(input[i])->uses;
  }
  return new_var(graph, value, graph->recording && needs_gradient);
}

static attn_var *view_of(attn_graph *g, attn_var *x, attn_tensor value) {
  attn_var *view = new_var(g, value, x->needs_gradient);
  if (view) view->root = x->root ? x->root : x;
  return view;
}

attn_var *attn_view_reshape(attn_graph *graph, attn_var *x, int rank, const int64_t *shape) {
  if (!x) return NULL;
  attn_tensor value;
  attn_status status = attn_tensor_reshape(&x->value, rank, shape, &value);
  return status == ATTN_OK ? view_of(graph, x, value) : attn_graph_error(graph, status);
}

attn_var *attn_view_slice(attn_graph *graph, attn_var *x, int axis, int64_t start, int64_t length) {
  if (!x) return NULL;
  attn_tensor value;
  attn_status status = attn_tensor_slice(&x->value, axis, start, length, &value);
  return status == ATTN_OK ? view_of(graph, x, value) : attn_graph_error(graph, status);
}

void *attn_graph_record(attn_graph *graph, size_t size, attn_var *output,
                        attn_status (*backward)(attn_graph *, attn_node *)) {
  if (!output || !output->needs_gradient) return NULL;
  attn_node *node = allocate(graph, size);
  if (!node) return NULL;
  memset(node, 0, size);
  node->backward = backward;
  node->output = output;
  node->previous = graph->last;
  graph->last = node;
  output->is_result = true;
  output->node = node;
  return node;
}

static void *take_buffer(attn_graph *g, size_t size) {
  for (attn_free_buffer **link = &g->free_buffers; *link; link = &(*link)->next)
    if ((*link)->size == size) {
      attn_free_buffer *found = *link;
      *link = found->next;
      return found->memory;
    }
  return allocate_values(g, size);
}

static void keep_buffer(attn_graph *g, void *memory, size_t size) {
  attn_free_buffer *freed = allocate(g, sizeof *freed);
  if (!freed) return;
  *freed = (attn_free_buffer){g->free_buffers, memory, size};
  g->free_buffers = freed;
}

void attn_graph_forget(attn_graph *graph, attn_var *x) {
  if (!x || !graph->recording || !x->is_result || !x->unread) return;
  x->forgotten = true;
  keep_buffer(graph, x->value.data, bytes_of(&x->value));
}

void attn_graph_restores(attn_var *x) {
  if (x) ++root_of(x)->restoring;
}

void attn_graph_discard(attn_graph *graph, const attn_node *since) {
  for (attn_node *node = graph->last; node && node != since; node = node->previous) {
    attn_var *x = node->output;
    if (!node->again || x->forgotten || x->discarded) continue;
    if (x->uses == 0 || x->uses != x->restoring) continue;
    x->discarded = true;
    keep_buffer(graph, x->value.data, bytes_of(&x->value));
  }
}

attn_tensor attn_graph_value(attn_graph *graph, attn_var *x) {
  attn_var *root = root_of(x);
  attn_tensor value = x->value;
  if (!root->discarded) return value;
  if (!root->restored) {
    attn_tensor whole = root->value;
    whole.data = root->restored = take_buffer(graph, bytes_of(&whole));
    attn_status status = whole.data ? root->node->again(graph, root->node, &whole) : graph->status;
    if (status != ATTN_OK) attn_graph_error(graph, status);
  }
  value.data = (char *)root->restored + ((char *)value.data - (char *)root->value.data);
  return value;
}

attn_tensor attn_graph_reuse(attn_graph *graph, attn_dtype dtype, int rank, const int64_t *shape) {
  return make_tensor(graph, dtype, rank, shape, graph->recording ? take_buffer : allocate_values);
}

/* The gradient of a view is the same view of the root's gradient: roots that need one are
 * contiguous, so offsets (in elements: a parameter's gradient may be wider) and strides carry over.
 */
static attn_tensor same_view(const attn_var *view, const attn_var *root) {
  attn_tensor gradient = view->value;
  ptrdiff_t bytes = (char *)view->value.data - (char *)root->value.data;
  ptrdiff_t elements = bytes / (ptrdiff_t)attn_dtype_size(root->value.dtype);
  gradient.dtype = root->gradient.dtype;
  gradient.data =
      (char *)root->gradient.data + elements * (ptrdiff_t)attn_dtype_size(gradient.dtype);
  return gradient;
}

static int64_t width_of(const attn_tensor *tensor) {
  return tensor->rank ? tensor->shape[tensor->rank - 1] : 1;
}

/* Whether a view shows whole columns of its root, all rows of them, and which. */
static bool columns_of(const attn_var *view, const attn_var *root, int64_t *begin, int64_t *end) {
  int64_t width = width_of(&root->value);
  int64_t rows = attn_rows(&root->value), count = attn_tensor_count(&view->value);
  if (rows == 0 || count == 0 || count % rows) return false;
  ptrdiff_t bytes = (char *)view->value.data - (char *)root->value.data;
  int64_t wanted = count / rows, inner = 1, outer = 1;
  *begin = bytes / (ptrdiff_t)attn_dtype_size(root->value.dtype);
  *end = *begin + wanted;
  if (*end > width) return false;
  if (wanted == width) return attn_tensor_is_contiguous(&view->value);
  for (int i = view->value.rank - 1; i >= 0; --i) {
    int64_t extent = view->value.shape[i], *walked = inner < wanted ? &inner : &outer;
    if (extent == 1) continue;
    if (view->value.stride[i] != (inner < wanted ? inner : width * outer)) return false;
    *walked *= extent;
  }
  return inner == wanted && outer == rows;
}

static void fill(attn_graph *g, const attn_tensor *tensor, double value) {
  attn_status status = attn_tensor_fill(tensor, value);
  if (status != ATTN_OK) attn_graph_error(g, status);
}

/* Zeroes what no view has written. */
static void complete_gradient(attn_graph *g, attn_var *root) {
  const attn_tensor *gradient = &root->gradient;
  int64_t rows = attn_rows(gradient), width = width_of(gradient);
  size_t size = attn_dtype_size(gradient->dtype);
  for (const attn_columns *part = root->unwritten; part; part = part->next) {
    size_t bytes = (size_t)(part->end - part->begin) * size;
    if (g->gpu) {
      attn_tensor columns = *gradient;
      if (columns.rank) columns.shape[columns.rank - 1] = part->end - part->begin;
      columns.data = (char *)gradient->data + (size_t)part->begin * size;
      fill(g, &columns, 0);
      continue;
    }
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (rows * width > ATTN_SERIAL_ELEMENTS)
    for (int64_t r = 0; r < rows; ++r)
      memset((char *)gradient->data + (size_t)(r * width + part->begin) * size, 0, bytes);
  }
  root->unwritten = NULL;
}

static bool any_unwritten(const attn_var *root, int64_t begin, int64_t end) {
  for (const attn_columns *part = root->unwritten; part; part = part->next)
    if (begin < part->end && end > part->begin) return true;
  return false;
}

/* Takes the columns [begin, end) off the list, if all of them are on it. */
static bool take_columns(attn_graph *g, attn_var *root, int64_t begin, int64_t end) {
  for (attn_columns **link = &root->unwritten; *link; link = &(*link)->next) {
    attn_columns *part = *link;
    if (begin < part->begin || end > part->end) continue;
    if (begin == part->begin && end == part->end) {
      *link = part->next;
    } else if (begin == part->begin) {
      part->begin = end;
    } else if (end < part->end) {
      attn_columns *rest = allocate(g, sizeof *rest);
      if (!rest) return false;
      *rest = (attn_columns){.next = part->next, .begin = end, .end = part->end};
      part->next = rest;
      part->end = begin;
    } else {
      part->end = begin;
    }
    return true;
  }
  return false;
}

/* Whether the view's part of the root's gradient holds something to add to. It does not when the
 * view is the first to write these columns; nothing is zeroed for it then. */
static bool view_accumulates(attn_graph *g, attn_var *view, attn_var *root, bool fresh) {
  int64_t begin, end;
  if (fresh) {
    root->unwritten = allocate(g, sizeof *root->unwritten);
    if (!root->unwritten) return true;
    *root->unwritten = (attn_columns){.end = width_of(&root->value)};
    if (!root->is_result) complete_gradient(g, root); /* nobody would do it later */
  }
  if (!root->unwritten) return true;
  if (columns_of(view, root, &begin, &end)) {
    if (!any_unwritten(root, begin, end)) return true;
    if (take_columns(g, root, begin, end)) return false;
  }
  complete_gradient(g, root);
  return true;
}

attn_tensor attn_gradient_of(attn_graph *graph, attn_var *x, bool *accumulate) {
  *accumulate = false;
  if (!x->needs_gradient) return (attn_tensor){0};
  attn_var *owner = x->root ? x->root : x;
  bool fresh = !owner->gradient.data;
  if (fresh) {
    owner->gradient = owner->value;
    owner->gradient.data = take_buffer(graph, bytes_of(&owner->value));
    if (!owner->gradient.data) return (attn_tensor){0};
  }
  if (x->root) {
    *accumulate = view_accumulates(graph, x, owner, fresh);
    x->gradient = same_view(x, owner);
  } else {
    *accumulate = !fresh;
    if (owner->unwritten) complete_gradient(graph, owner);
  }
  return x->gradient;
}

attn_tensor attn_gradient_overwrite(attn_graph *graph, attn_var *x) {
  bool accumulate;
  attn_tensor target = attn_gradient_of(graph, x, &accumulate);
  if (!target.data || !accumulate) return target;
  return attn_graph_tensor(graph, target.dtype, target.rank, target.shape);
}

void attn_gradient_add(attn_graph *graph, attn_var *x, const attn_tensor *part) {
  bool accumulate;
  attn_tensor target = attn_gradient_of(graph, x, &accumulate);
  if (target.data && part->data && part->data != target.data)
    attn_add_tensor(graph, &target, part, 1, accumulate);
}

static bool has_rows(const attn_tensor *tensor) {
  int last = tensor->rank - 1;
  return attn_row_stride(tensor) >= 0 &&
         (last < 0 || tensor->shape[last] == 1 || tensor->stride[last] == 1);
}

attn_tensor attn_gradient_rows(attn_graph *graph, attn_var *x, bool *accumulate) {
  attn_tensor target = attn_gradient_of(graph, x, accumulate);
  if (!target.data) return target;
  if (!has_rows(&target)) {
    if (!*accumulate) fill(graph, &target, 0); /* what is added later needs something there */
    *accumulate = false;
    target = attn_graph_tensor(graph, target.dtype, target.rank, target.shape);
  }
  return attn_as_rows(graph, &target);
}

void attn_gradient_hand_over(attn_graph *graph, attn_var *x, attn_var *output) {
  bool free_to_take = x->needs_gradient && !x->root && !x->gradient.data &&
                      x->value.dtype == output->gradient.dtype &&
                      attn_tensor_is_contiguous(&x->value);
  if (!free_to_take) {
    attn_gradient_add(graph, x, &output->gradient);
    return;
  }
  x->gradient = x->value;
  x->gradient.data = output->gradient.data;
  output->gradient.data = NULL;
}

/* Runs nodes until the tape is empty. */
static attn_status run_tape(attn_graph *g) {
  while (g->last) {
    attn_node *node = g->last;
    attn_var *output = node->output;
    g->last = node->previous;
    if (output->root) return attn_fail(ATTN_INTERNAL, "graph: an operation returned a view");
    if (!output->gradient.data) continue; /* the loss does not depend on it */
    if (output->unwritten) complete_gradient(g, output);
    attn_status status = node->backward(g, node);
    if (status == ATTN_OK) status = g->status;
    if (status != ATTN_OK) return status;
    if (output->restored) { /* nobody reads it any more */
      keep_buffer(g, output->restored, bytes_of(&output->value));
      output->restored = NULL;
    }
    if (!output->gradient.data) continue; /* handed over */
    keep_buffer(g, output->gradient.data, bytes_of(&output->value));
    output->gradient.data = NULL;
  }
  return ATTN_OK;
}

attn_status attn_graph_backward(attn_graph *graph, attn_var *loss, double scale) {
  if (graph->status != ATTN_OK) return graph->status;
  if (!loss || attn_tensor_count(&loss->value) != 1)
    return attn_fail(ATTN_INVALID_SHAPE, "backward: the loss must have one element");
  if (!loss->needs_gradient)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "backward: the loss depends on nothing that is trained");
  if (graph->used_up)
    return attn_fail(ATTN_INVALID_ARGUMENT, "backward: the tape has been used up; run forward "
                                            "again after attn_graph_reset");
  if (graph->expected != 0 && scale != graph->expected)
    return attn_fail(ATTN_INVALID_ARGUMENT, "backward: a scale of %g was expected, not %g",
                     graph->expected, scale);
  graph->used_up = true;
  graph->loss = loss;
  graph->scale = scale;
  bool accumulate;
  attn_tensor seed = attn_gradient_of(graph, loss, &accumulate);
  if (!seed.data) return graph->status;
  if (accumulate) scale += attn_tensor_get(&seed, (int64_t[ATTN_MAX_RANK]){0});
  ATTN_TRY(attn_tensor_fill(&seed, scale));
  attn_status status = run_tape(graph);
  attn_graph_error(graph, status);
  return status;
}

typedef struct checkpoint_node {
  attn_node node;
  attn_var *(*block)(attn_graph *, void *, attn_var *);
  void *context;
  attn_var *x;
} checkpoint_node;

/* A list of the same buffers. What is taken from it stays on the other. */
static attn_free_buffer *copy_buffers(attn_graph *g, const attn_free_buffer *list) {
  attn_free_buffer *first = NULL, **link = &first;
  for (; list; list = list->next, link = &(*link)->next) {
    *link = allocate(g, sizeof **link);
    if (!*link) return first;
    **link = (attn_free_buffer){NULL, list->memory, list->size};
  }
  return first;
}

/* The block runs again on the same x. x's gradient gets its place, outside of what is released
 * here, before the block adds to it. Buffers that are free serve the block, and are again when all
 * of it is done; those that it frees itself go with its memory. */
static attn_status checkpoint_backward(attn_graph *g, attn_node *node) {
  checkpoint_node *self = (checkpoint_node *)node;
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (self->x->needs_gradient && !dx.data) return g->status;
  if (dx.data && !accumulate) ATTN_TRY(attn_device_zero(g->device, dx.data, bytes_of(&dx)));
  attn_graph_mark mark = attn_graph_get_mark(g);
  attn_node *outer_tape = g->last;
  attn_free_buffer *outer_buffers = g->free_buffers;
  void *upstream = node->output->gradient.data;
  g->last = NULL;
  g->free_buffers = copy_buffers(g, outer_buffers);

  attn_var *y = self->block(g, self->context, self->x);
  if (y) attn_gradient_hand_over(g, y, node->output);
  attn_status status = g->status == ATTN_OK ? run_tape(g) : g->status;

  node->output->gradient.data = upstream; /* the block has had its use of it */
  g->last = outer_tape;
  g->free_buffers = outer_buffers;
  attn_graph_release(g, mark);
  return status;
}

attn_var *attn_graph_checkpoint(attn_graph *graph,
                                attn_var *(*block)(attn_graph *, void *context, attn_var *x),
                                void *context, attn_var *x) {
  if (!x) return NULL;
  if (!graph->recording) return block(graph, context, x);
  ++root_of(x)->uses;
  attn_tensor value = attn_graph_tensor(graph, x->value.dtype, x->value.rank, x->value.shape);
  attn_var *output = attn_graph_result(graph, value, 0, NULL);
  if (!output) return NULL;
  output->needs_gradient = true; /* the block's parameters may need one even if x does not */
  checkpoint_node *node = attn_graph_record(graph, sizeof *node, output, checkpoint_backward);
  if (!node) return NULL;
  node->block = block;
  node->context = context;
  node->x = x;

  attn_graph_mark mark = attn_graph_get_mark(graph);
  graph->recording = false;
  graph->records_later = true;
  attn_var *y = block(graph, context, x);
  graph->recording = true;
  graph->records_later = false;
  if (y && (y->value.dtype != value.dtype || !attn_same_shape(&y->value, &value)))
    attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                    "checkpoint: the block makes %s of %s, it must keep shape and dtype",
                    attn_shape_text(&y->value, (char[128]){0}),
                    attn_shape_text(&value, (char[128]){0}));
  else if (y)
    attn_add_tensor(graph, &value, &y->value, 1, false);
  attn_graph_release(graph, mark);
  return graph->status == ATTN_OK ? output : NULL;
}

int64_t attn_rows(const attn_tensor *tensor) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < tensor->rank; ++i) rows *= tensor->shape[i];
  return rows;
}

int64_t attn_row_stride(const attn_tensor *tensor) {
  if (attn_rows(tensor) <= 1) return tensor->rank ? tensor->shape[tensor->rank - 1] : 1;
  int64_t stride = -1, extent = 1; /* of the axes that are collapsed so far, innermost first */
  for (int i = tensor->rank - 2; i >= 0; --i) {
    if (tensor->shape[i] == 1) continue;
    if (stride < 0)
      stride = tensor->stride[i];
    else if (tensor->stride[i] != stride * extent)
      return -1;
    extent *= tensor->shape[i];
  }
  return stride;
}

attn_tensor attn_as_rows(attn_graph *graph, const attn_tensor *tensor) {
  int64_t width = tensor->rank ? tensor->shape[tensor->rank - 1] : 1;
  if (has_rows(tensor)) {
    attn_tensor rows = *tensor;
    rows.rank = 2;
    rows.stride[0] = attn_row_stride(tensor);
    rows.shape[0] = attn_rows(tensor);
    rows.shape[1] = width;
    rows.stride[1] = 1;
    return rows;
  }
  attn_tensor copy = attn_graph_tensor(graph, tensor->dtype, tensor->rank, tensor->shape);
  if (!copy.data) return copy;
  attn_status status = attn_tensor_copy(tensor, &copy);
  if (status != ATTN_OK) attn_graph_error(graph, status);
  return attn_as_rows(graph, &copy);
}

/* The offset of item r, in row-major order of the first `axes` axes. */
static int64_t item_offset(const attn_tensor *tensor, int axes, int64_t r) {
  int64_t offset = 0;
  for (int i = axes - 1; i >= 0; --i) {
    offset += r % tensor->shape[i] * tensor->stride[i];
    r /= tensor->shape[i];
  }
  return offset;
}

/* Gapless tensors are added in pieces of this many elements, whatever the shape. */
enum { PIECE = 1 << 13 };

void attn_add_tensor(attn_graph *graph, const attn_tensor *y, const attn_tensor *x, double scale,
                     bool accumulate) {
  int64_t total = attn_tensor_count(y), width = y->rank ? y->shape[y->rank - 1] : 1;
  if (total == 0) return;
  if (graph->gpu) {
    attn_tensor same = *x; /* gapless tensors may be of other shapes */
    attn_status status =
        attn_same_shape(x, y) ? ATTN_OK : attn_tensor_reshape(x, y->rank, y->shape, &same);
    if (status != ATTN_OK) attn_graph_error(graph, status);
    attn_pass_add(graph, y, scale, &same, accumulate ? 1 : 0, accumulate ? y : NULL);
    return;
  }
  bool flat = attn_tensor_is_contiguous(y) && attn_tensor_is_contiguous(x);
  bool rows = width == 1 || (y->stride[y->rank - 1] == 1 && x->stride[x->rank - 1] == 1);
  int64_t step = flat ? PIECE : rows ? width : 1;
  int inner = rows ? 1 : 0; /* axes that are walked by the kernel */
  const attn_kernels *kernels = graph->kernels;
#pragma omp parallel for num_threads(graph->threads) schedule(static) if (total > 1 << 15)
  for (int64_t start = 0; start < total; start += step) {
    int64_t r = start / step, count = total - start < step ? total - start : step;
    attn_span to = attn_row(y, 1, flat ? start : item_offset(y, y->rank - inner, r));
    attn_span from = attn_row(x, 1, flat ? start : item_offset(x, x->rank - inner, r));
    if (accumulate)
      kernels->row_add(to, 1, to, scale, from, count);
    else
      kernels->row_add(to, scale, from, 0, (attn_span){0}, count);
  }
}
