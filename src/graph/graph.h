/* The tape: operations run at once and record how to differentiate themselves.
 *
 * A graph lives on one device and owns an arena there (and one of the host, for itself); every
 * variable, its value and its gradient live in them until the graph is reset. An operation returns
 * the variable of its result, or NULL after an error, and passes NULL inputs on, so that models
 * read like the mathematics and check attn_graph_status once at the end.
 *
 * Dtypes: a graph has a compute dtype (bfloat16, float32 or float64). Sums that must stay exact
 * (the residual stream, the loss, gates' logarithms) have its `wide` dtype: float64 for float64,
 * else float32. With recording off nothing is kept and a backward costs nothing. */
#ifndef ATTN_GRAPH_GRAPH_H
#define ATTN_GRAPH_GRAPH_H

#include "attn/tensor.h"
#include "base/memory.h"
#include "base/status.h"
#include "graph/parameter.h"
#include "kernels/kernels.h"
#include "tensor/device.h"

typedef struct attn_graph attn_graph;
typedef struct attn_node attn_node;

typedef struct attn_var {
  attn_tensor value;
  attn_tensor gradient; /* same shape and dtype as value; data is NULL until something flows in */
  bool needs_gradient;
  struct attn_var *root; /* of a view: the variable whose memory it shows, gradient included */
  bool is_result;        /* of a recorded operation */
  bool unread;           /* by the backward of the operation that made it */
  bool forgotten;        /* its memory serves others for good */
  attn_node *node;       /* of the operation that made it, where one was recorded */
  int uses, restoring; /* operations that read its value; those of them that use attn_graph_value */
  bool discarded;      /* its memory serves others until backward needs it, */
  void *restored;      /* which is where it is then */
  struct attn_columns *unwritten; /* of a root's gradient, as rows: what no view has written yet */
} attn_var;

/* How to go back through one operation. Operations put their own data behind it. */
struct attn_node {
  attn_status (*backward)(attn_graph *graph, attn_node *node);
  /* Makes the output's value again, in `value`; NULL: it cannot. */
  attn_status (*again)(attn_graph *graph, attn_node *node, const attn_tensor *value);
  attn_var *output;
  attn_node *previous;
};

/* Of neurons on the processor: steps, and those that were spikes. */
typedef struct attn_spike_count {
  double fired, steps;
} attn_spike_count;

struct attn_graph {
  attn_arena *arena;  /* of the host: nodes, variables, tables of pointers */
  attn_arena *memory; /* of the device: values and gradients; the same one on the processor */
  attn_device device;
  attn_gpu *gpu; /* NULL on the processor */
  attn_dtype compute, wide;
  bool recording;
  bool records_later;   /* not recording, but the same runs again in backward (checkpoints) */
  bool used_up;         /* by a backward: the tape is gone */
  double expected;      /* see attn_graph_expect; 0: nothing is */
  double scale;         /* that the backward in progress started with */
  const attn_var *loss; /* that backward started from */
  attn_status status;
  attn_node *last;
  struct attn_free_buffer *free_buffers; /* gradients that have been used up */
  const attn_kernels *kernels;
  int threads;
  attn_spike_count *spikes;      /* where they are counted; NULL: they are not */
  struct attn_replay *replay;    /* the one that is being captured (replay.h), or NULL */
  struct attn_plan_cache *plans; /* of the engines' problems, so that no step plans twice */
};

attn_status attn_graph_create(attn_dtype compute, attn_graph **graph); /* on the processor */
attn_status attn_graph_create_on(attn_device device, attn_dtype compute, attn_graph **graph);
void attn_graph_destroy(attn_graph *graph);
/* Of a fresh graph: takes that much memory of the device at once, if it is there; a wish, for
 * callers that know what they will need (see attn_arena_reserve). */
void attn_graph_reserve(attn_graph *graph, size_t bytes);
/* Forgets all variables and the tape; takes the current kernel path and threads. */
void attn_graph_reset(attn_graph *graph, bool recording);
/* ATTN_OK, or the first error since the last reset (with its message, if no later call failed). */
attn_status attn_graph_status(const attn_graph *graph);
/* Remembers the first error and returns NULL:  return attn_graph_fail(g, status, "..."); */
void *attn_graph_fail(attn_graph *graph, attn_status status, const char *format, ...)
    ATTN_PRINTF(3, 4);
/* The same for a status whose message is set already. */
void *attn_graph_error(attn_graph *graph, attn_status status);

/* Runs the tape backwards from `loss` (one element) with d loss = scale. Gradients of parameters
 * are added to what they hold. Once after each reset. */
attn_status attn_graph_backward(attn_graph *graph, attn_var *loss, double scale);

/* After a reset: promises that this forward's loss is what attn_graph_backward will start from,
 * with this scale. An operation that has its gradients in the forward pass may then leave them
 * where they belong, the parameters' included, even if backward is never called. */
void attn_graph_expect(attn_graph *graph, double scale);

/* Memory since a mark may be given back before the reset: of both arenas. */
typedef struct attn_graph_mark {
  attn_arena_mark host, device;
} attn_graph_mark;
attn_graph_mark attn_graph_get_mark(const attn_graph *graph);
void attn_graph_release(attn_graph *graph, attn_graph_mark mark);

/* Variables. Values lie on the graph's device. */
attn_var *attn_graph_input(attn_graph *graph, const attn_tensor *value); /* no gradient */
attn_var *attn_graph_leaf(attn_graph *graph, const attn_tensor *value);  /* with; contiguous */
attn_var *attn_graph_parameter(attn_graph *graph, attn_parameter *parameter);
/* A contiguous tensor on the graph's device, uninitialised; data is NULL after an error. */
attn_tensor attn_graph_tensor(attn_graph *graph, attn_dtype dtype, int rank, const int64_t *shape);
/* The variable of a result; needs a gradient if recording and any of the inputs does. */
attn_var *attn_graph_result(attn_graph *graph, attn_tensor value, int inputs,
                            attn_var *const *input);

/* Views: the same memory, value and gradient. */
attn_var *attn_view_reshape(attn_graph *graph, attn_var *x, int rank, const int64_t *shape);
attn_var *attn_view_slice(attn_graph *graph, attn_var *x, int axis, int64_t start, int64_t length);

/* Records an operation: `size` bytes that begin with an attn_node; NULL when nothing needs to be
 * recorded (check `output->needs_gradient`) or after an error. */
void *attn_graph_record(attn_graph *graph, size_t size, attn_var *output,
                        attn_status (*backward)(attn_graph *, attn_node *));
/* For a backward: where to put the gradient of x. *accumulate tells whether it has to be added to
 * what is there. Data is NULL when x needs no gradient, or (with status set) after an error. */
attn_tensor attn_gradient_of(attn_graph *graph, attn_var *x, bool *accumulate);
/* The same for callers that can only overwrite: a fresh tensor of x's shape when there is something
 * to add to; attn_gradient_add then adds it. */
attn_tensor attn_gradient_overwrite(attn_graph *graph, attn_var *x);
void attn_gradient_add(attn_graph *graph, attn_var *x, const attn_tensor *part);
/* attn_gradient_of as rows (see attn_as_rows): where the strides of a view forbid that, fresh rows,
 * which attn_gradient_add then adds; it does nothing to rows that are in place already. */
attn_tensor attn_gradient_rows(attn_graph *graph, attn_var *x, bool *accumulate);

/* Memory for time, value by value: forgets the values of the results recorded after `since` that
 * can be made again and that are read by such operations only as ask for them by attn_graph_value
 * (and say so when they are recorded, by attn_graph_restores). Others keep theirs. The bits are the
 * same. */
void attn_graph_discard(attn_graph *graph, const attn_node *since);
void attn_graph_restores(attn_var *x); /* x may be NULL */
/* In a backward: x's value, made again if it was discarded. Not between a mark and its release. */
attn_tensor attn_graph_value(attn_graph *graph, attn_var *x);
/* Nobody but the operation that made x will read its value: if that does not either, its memory
 * serves later results of its size (attn_graph_reuse). */
void attn_graph_forget(attn_graph *graph, attn_var *x);
/* attn_graph_tensor, in memory that is not needed any more where there is some of this size. It
 * must not be released to a mark. */
attn_tensor attn_graph_reuse(attn_graph *graph, attn_dtype dtype, int rank, const int64_t *shape);

/* For a backward that is done with the gradient of its output: gives it to x, as it is when x has
 * none yet, else added. */
void attn_gradient_hand_over(attn_graph *graph, attn_var *x, attn_var *output);

/* Runs block(context, x) keeping only its result, and again in backward: memory for time. The
 * result must have x's shape and dtype. The block must do the same both times, and use no other
 * variable that was made outside of it (parameters it asks for itself). */
attn_var *attn_graph_checkpoint(attn_graph *graph,
                                attn_var *(*block)(attn_graph *, void *context, attn_var *x),
                                void *context, attn_var *x);

/* Rows: a tensor seen as `rows` rows of its innermost axis. */
int64_t attn_rows(const attn_tensor *tensor);
/* Row r of a tensor whose leading axes collapse to one stride (see attn_row_stride), of a dtype
 * that the row kernels know. */
static inline attn_span attn_row(const attn_tensor *tensor, int64_t row_stride, int64_t r) {
  int64_t size = tensor->dtype == ATTN_BF16 ? 2 : tensor->dtype == ATTN_F32 ? 4 : 8;
  return (attn_span){tensor->data ? (char *)tensor->data + r * row_stride * size : NULL,
                     tensor->dtype};
}
/* The distance between rows in elements when all leading axes collapse, else -1. */
int64_t attn_row_stride(const attn_tensor *tensor);
/* tensor as [rows, innermost], or a contiguous copy from the arena if its strides forbid the view.
 */
attn_tensor attn_as_rows(attn_graph *graph, const attn_tensor *tensor);
/* y = scale x, or y += scale x, element by element over any strides, on the graph's threads. */
void attn_add_tensor(attn_graph *graph, const attn_tensor *y, const attn_tensor *x, double scale,
                     bool accumulate);

#endif
