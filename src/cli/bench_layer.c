/* attn bench --layer: the mixer as a model's layer has it, with its norm, projections and gates:
 *
 *   y = mixer(RMSNorm(x)),  x [batch * length, heads * dim]
 *
 * on a model of one layer with fresh weights. Floating-point operations are those of the
 * projections and of the engine's plan; bytes are x, y (with a backward, their gradients) and the
 * weights; memory is all that the layer uses beside its weights. */
#include "cli/bench.h"
#include "base/memory.h"
#include "base/random.h"
#include "engines/dense/dense.h"
#include "engines/plan_cache.h"
#include "graph/operations.h"
#include "graph/replay.h"
#include "layers/layers.h"
#include "models/model.h"
#include "tensor/device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHECKED_TOKENS = 192, CHECKED_STEPS = 3, SEED = 1 };

/* Errors relative to float64: the operator's rounding (see bench_measure.c) and that of the
 * projections before and behind it, whose weights and results are rounded too. */
static const double tolerance[ATTN_DTYPE_COUNT] = {
    [ATTN_F64] = 1e-11, [ATTN_F32] = 1e-5, [ATTN_BF16] = 0.025};

typedef struct layer {
  attn_bench_case c;
  int64_t rows, hidden; /* of one execution */
  attn_model *model;
  attn_graph *graph;
  attn_tensor x;        /* [rows, hidden] */
  attn_tensor d_y;      /* [1, rows * hidden]; backward only */
  attn_parameter along; /* d_y as the weight of loss = y . d_y */
  attn_state *state;    /* step only */
  attn_replay *replay;  /* steps on a GPU, */
  bool plain;           /* unless they cannot be captured */
  int64_t steps;
  attn_var *x_var, *y_var;
} layer;

static void destroy(layer *l) {
  attn_replay_destroy(l->replay);
  attn_state_destroy(l->state);
  attn_weight_destroy(l->along.weight);
  if (l->d_y.data) attn_tensor_destroy(&l->d_y);
  if (l->x.data) attn_tensor_destroy(&l->x);
  attn_graph_destroy(l->graph);
  attn_model_destroy(l->model);
}

static void fill(const attn_tensor *tensor, int64_t used) {
  attn_random random = {.seed = SEED};
  int64_t count = attn_tensor_count(tensor);
  for (int64_t i = 0; i < count; ++i) {
    double value = i < used ? 2 * attn_random_uniform(&random) - 1 : 0;
    if (tensor->dtype == ATTN_F64)
      ((double *)tensor->data)[i] = value;
    else
      ((float *)tensor->data)[i] = (float)value;
  }
}

static attn_status create_filled(attn_device device, attn_dtype dtype, const int64_t *shape,
                                 attn_tensor *tensor) {
  attn_tensor here;
  ATTN_TRY(attn_tensor_create(dtype, 2, shape, &here));
  fill(&here, shape[0] * shape[1]);
  attn_status status = attn_tensor_create_on(device, dtype, 2, shape, tensor);
  if (status == ATTN_OK) status = attn_tensor_copy(&here, tensor);
  attn_tensor_destroy(&here);
  return status;
}

static attn_status create_model(layer *l) {
  const attn_bench_case *c = &l->c;
  char config[512], kv_heads[64] = "";
  if (c->op->groups)
    snprintf(kv_heads, sizeof kv_heads, ", \"num_key_value_heads\": %lld", (long long)c->kv_heads);
  snprintf(
      config, sizeof config,
      "{\"vocab_size\": 2, \"hidden_size\": %lld, \"num_hidden_layers\": 1, \"mixer\": \"%s\", "
      "\"num_attention_heads\": %lld, \"head_dim\": %lld, \"intermediate_size\": 1%s}",
      (long long)l->hidden, c->op->name, (long long)c->heads, (long long)c->dim, kv_heads);
  ATTN_TRY(attn_model_create(config, SEED, c->dtype, &l->model));
  if (c->pass == ATTN_BENCH_BACKWARD) ATTN_TRY(attn_model_make_trainable(l->model));
  return attn_model_move(l->model, c->device);
}

static attn_status create_backward(layer *l) {
  attn_dtype wide = l->x.dtype;
  int64_t shape[2] = {1, l->rows * l->hidden};
  ATTN_TRY(create_filled(l->c.device, wide, shape, &l->d_y));
  l->along.name = "d_y";
  l->along.value = l->d_y;
  ATTN_TRY(attn_weight_create(1, shape[1], l->c.dtype, &l->along.weight));
  return attn_weight_set(l->along.weight, &l->d_y);
}

static attn_status create_state(layer *l) {
  const attn_layer_config *config = &l->model->config.layers[0];
  attn_state_part parts[ATTN_STATE_PARTS];
  int count = config->mixer->state(&config->options, l->c.dtype, parts);
  return attn_state_create(l->c.device, parts, count, l->c.length + ATTN_BENCH_MOST_TIMES + 1, 1,
                           NULL, &l->state);
}

static attn_status fill_layer(layer *l) {
  attn_dtype wide = l->c.dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  int64_t shape[2] = {l->rows, l->hidden};
  ATTN_TRY(create_model(l));
  ATTN_TRY(attn_graph_create_on(l->c.device, l->c.dtype, &l->graph));
  ATTN_TRY(create_filled(l->c.device, wide, shape, &l->x));
  if (l->c.pass == ATTN_BENCH_BACKWARD) ATTN_TRY(create_backward(l));
  return l->c.pass == ATTN_BENCH_STEP ? create_state(l) : ATTN_OK;
}

static attn_status create(const attn_bench_case *c, layer *l) {
  *l = (layer){.c = *c, .rows = c->batch * c->length, .hidden = c->heads * c->dim};
  attn_status status = fill_layer(l);
  if (status != ATTN_OK) destroy(l);
  return status;
}

/* Queues y of `rows` rows of x; they go behind what the state has seen, if there is one. */
static attn_status apply(layer *l, int64_t rows, bool recording) {
  attn_graph *g = l->graph;
  const attn_layer_config *config = &l->model->config.layers[0];
  attn_layer_parameters *p = &l->model->layers[0];
  attn_tensor x;
  ATTN_TRY(attn_tensor_slice(&l->x, 0, 0, rows, &x));
  attn_mixer_call call = {.options = &config->options,
                          .parameters = p->mixer,
                          .layout = attn_layout_equal(l->c.batch, l->c.length),
                          .state = l->state};
  if (l->state) {
    call.layout = attn_layout_equal(1, rows);
    call.layout.position = attn_state_position(l->state);
    call.layout.position_place = attn_state_position_place(l->state);
  }
  l->x_var = recording ? attn_graph_leaf(g, &x) : attn_graph_input(g, &x);
  attn_var *norm = attn_layer_rms_norm(g, l->x_var, attn_graph_parameter(g, p->token_norm[0]),
                                       l->model->config.norm_epsilon);
  l->y_var = attn_mixer_apply(g, config->mixer, &call, norm);
  return attn_graph_status(g);
}

static attn_status forward(layer *l, int64_t rows, bool recording) {
  attn_graph_reset(l->graph, recording);
  ATTN_TRY(apply(l, rows, recording));
  if (l->state) attn_state_advance(l->state, rows);
  return ATTN_OK;
}

/* One token, as sessions decode: on a GPU the first step runs, the others replay it if they can. */
static attn_status step(layer *l) {
  if (!attn_is_cuda(l->c.device) || ++l->steps == 1 || l->plain) return forward(l, 1, false);
  ATTN_TRY(attn_state_prepare(l->state));
  if (!l->replay) {
    ATTN_TRY(attn_replay_create(l->c.device, &l->replay));
    ATTN_TRY(attn_replay_begin(l->replay, l->graph));
    attn_status applied = apply(l, 1, false), kept = attn_replay_end(l->replay, l->graph);
    l->plain = applied != ATTN_OK || kept != ATTN_OK;
    if (l->plain) return forward(l, 1, false);
  }
  ATTN_TRY(attn_replay_queue(l->replay));
  attn_state_advance(l->state, 1);
  return ATTN_OK;
}

static attn_status backward(layer *l) {
  int64_t shape[2] = {1, l->rows * l->hidden};
  attn_var *flat = attn_view_reshape(l->graph, l->y_var, 2, shape);
  attn_var *loss = attn_op_linear_wide(l->graph, flat, &l->along);
  ATTN_TRY(attn_graph_status(l->graph));
  return attn_graph_backward(l->graph, loss, 1);
}

/* What an execution needs first: a backward pass the forward one. */
static attn_status get_ready(layer *l) {
  return l->c.pass == ATTN_BENCH_BACKWARD ? forward(l, l->rows, true) : ATTN_OK;
}

/* One execution of the pass. */
static attn_status execute(layer *l) {
  if (l->c.pass == ATTN_BENCH_BACKWARD) return backward(l);
  return l->c.pass == ATTN_BENCH_STEP ? step(l) : forward(l, l->rows, false);
}

static const attn_tensor *result(const layer *l) {
  return l->c.pass == ATTN_BENCH_BACKWARD ? &l->x_var->gradient : &l->y_var->value;
}

/* Fills the state with `length` tokens. */
static attn_status prefill(layer *l) {
  return l->state ? forward(l, l->c.length, false) : ATTN_OK;
}

/* Check ---------------------------------------------------------------------------------------*/

static attn_status wrong(const attn_bench_case *c, const char *what) {
  return attn_fail(ATTN_INTERNAL, "the layer %s, %s in %s, gives a wrong result: %s", c->op->name,
                   attn_bench_passes[c->pass], attn_dtype_name(c->dtype), what);
}

static attn_status compare(const layer *got, const layer *expected, double *error) {
  const attn_tensor *from[2] = {result(got), result(expected)};
  attn_tensor wide[2] = {0};
  double difference = 0, norm = 0;
  attn_status status = ATTN_OK;
  for (int i = 0; i < 2 && status == ATTN_OK; ++i) {
    status = attn_tensor_create(ATTN_F64, from[i]->rank, from[i]->shape, &wide[i]);
    if (status == ATTN_OK) status = attn_tensor_copy(from[i], &wide[i]);
  }
  const double *a = wide[0].data, *b = wide[1].data;
  for (int64_t i = 0; status == ATTN_OK && i < attn_tensor_count(from[0]); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  for (int i = 0; i < 2; ++i)
    if (wide[i].data) attn_tensor_destroy(&wide[i]);
  *error = sqrt(difference / norm);
  return status;
}

static attn_status run_small(const attn_bench_case *c, layer *l) {
  ATTN_TRY(create(c, l));
  attn_status status = prefill(l);
  if (status == ATTN_OK) status = get_ready(l);
  int times = c->pass == ATTN_BENCH_STEP ? CHECKED_STEPS : 1;
  for (int i = 0; i < times && status == ATTN_OK; ++i) status = execute(l);
  if (status != ATTN_OK) destroy(l);
  return status;
}

static attn_status check(const attn_bench_case *c, double *error) {
  attn_bench_case small = *c, exact;
  attn_kernel_path path = attn_get_kernel_path();
  layer got, expected;
  char text[64];
  small.batch = 1;
  if (small.length > CHECKED_TOKENS) small.length = CHECKED_TOKENS;
  exact = small;
  exact.dtype = ATTN_F64;
  exact.device = (attn_device){0};
  ATTN_TRY(run_small(&small, &got));
  attn_status status = attn_set_kernel_path(ATTN_PATH_GENERIC);
  if (status == ATTN_OK) status = run_small(&exact, &expected);
  attn_set_kernel_path(path);
  if (status == ATTN_OK) {
    status = compare(&got, &expected, error);
    destroy(&expected);
  }
  destroy(&got);
  ATTN_TRY(status);
  if (*error <= tolerance[c->dtype]) return ATTN_OK; /* false for NaN too */
  snprintf(text, sizeof text, "its error is %.3g, expected at most %.3g", *error,
           tolerance[c->dtype]);
  return wrong(c, text);
}

static attn_status check_finite(const layer *l) {
  const attn_tensor *t = result(l);
  attn_tensor here;
  ATTN_TRY(attn_tensor_create(ATTN_F32, t->rank, t->shape, &here));
  attn_status status = attn_tensor_copy(t, &here);
  const float *numbers = here.data;
  for (int64_t i = 0; status == ATTN_OK && i < attn_tensor_count(&here); ++i)
    if (!isfinite(numbers[i])) status = wrong(&l->c, "not all of it is finite");
  attn_tensor_destroy(&here);
  return status;
}

/* Work ----------------------------------------------------------------------------------------*/

static void add_flops(void *context, const attn_plan_info *info) {
  *(double *)context += info->flops;
}

static double engine_flops(const layer *l) {
  double sum = 0;
  attn_plan_cache_visit(l->graph->plans, add_flops, &sum);
  return sum;
}

static void describe_plan(void *context, const attn_plan_info *info) {
  snprintf(context, sizeof((attn_bench_row *)0)->plan, "%s", info->description);
}

/* Operations of the engine in one execution. `before`: of the plans before it. The plan of a
 * recorded forward counts forward and backward together; that of a step over pages counts as many
 * keys as there is room for, so the operator's own plan is asked. */
static attn_status count_engine(const layer *l, double before, double *flops) {
  attn_bench_ready ready;
  *flops = engine_flops(l) - before * (l->c.pass == ATTN_BENCH_BACKWARD ? 2 : 1);
  if (!l->state || l->c.op->recurrent) return ATTN_OK;
  ATTN_TRY(attn_bench_prepare(&l->c, &ready));
  *flops = ready.info.flops;
  attn_bench_dispose(&ready);
  return ATTN_OK;
}

static attn_status count_work(const layer *l, double before, attn_bench_row *row) {
  const attn_bench_case *c = &l->c;
  bool is_backward = c->pass == ATTN_BENCH_BACKWARD;
  double rows = c->pass == ATTN_BENCH_STEP ? 1 : (double)l->rows, weights = 0, weight_bytes = 0;
  attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
  const attn_layer_config *config = &l->model->config.layers[0];
  int count = config->mixer->parameters(&config->options, shapes);
  for (int i = 0; i < count; ++i) {
    double size =
        (double)shapes[i].shape[0] * (shapes[i].rank > 1 ? (double)shapes[i].shape[1] : 1);
    weight_bytes += size * (double)attn_dtype_size(c->dtype);
    if (shapes[i].product) weights += size;
  }
  ATTN_TRY(count_engine(l, before, &row->flops));
  row->flops += 2 * rows * weights * (is_backward ? 2 : 1);
  row->bytes = weight_bytes * (is_backward ? 2 : 1) +
               rows * (double)l->hidden * (double)attn_dtype_size(c->dtype) * (is_backward ? 3 : 2);
  if (l->state) /* a matrix is read and written, keys and values are read */
    row->bytes += (c->op->recurrent ? 2 : 1) * (double)attn_state_bytes(l->state);
  attn_plan_cache_visit(l->graph->plans, describe_plan, row->plan);
  return ATTN_OK;
}

static attn_status time_layer(layer *l, const attn_bench_effort *effort, attn_bench_row *row) {
  attn_bench_timer timer = {.seconds = effort->seconds, .quiet = effort->quiet};
  double before = 0;
  if (l->c.pass == ATTN_BENCH_BACKWARD) ATTN_TRY(forward(l, l->rows, false));
  ATTN_TRY(prefill(l));
  if (l->c.pass != ATTN_BENCH_FORWARD) before = engine_flops(l);
  ATTN_TRY(get_ready(l));
  ATTN_TRY(execute(l)); /* warms up */
  ATTN_TRY(check_finite(l));
  ATTN_TRY(count_work(l, before, row));
  for (;;) {
    ATTN_TRY(get_ready(l));
    ATTN_TRY(attn_device_synchronize(l->c.device));
    if (!attn_bench_timer_begin(&timer)) break;
    ATTN_TRY(execute(l));
    ATTN_TRY(attn_device_synchronize(l->c.device));
    attn_bench_timer_end(&timer);
  }
  return attn_bench_timer_result(&timer, row);
}

attn_status attn_bench_measure_layer(const attn_bench_case *c, const attn_bench_limits *limits,
                                     const attn_bench_effort *effort, attn_bench_row *row) {
  layer l;
  *row = (attn_bench_row){.c = *c};
  if (c->pass == ATTN_BENCH_STEP && c->batch > 1)
    return attn_fail(ATTN_UNSUPPORTED, "the step of a layer has one sequence: --batch is %lld",
                     (long long)c->batch);
  ATTN_TRY(check(c, &row->error));
  ATTN_TRY(create(c, &l));
  size_t before = attn_device_live_bytes(c->device);
  attn_device_reset_peak(c->device);
  attn_status status = time_layer(&l, effort, row);
  row->extra = (double)(attn_device_peak_bytes(c->device) - before);
  destroy(&l);
  attn_bench_rate(row, limits);
  return status;
}
