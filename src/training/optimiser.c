#include "training/optimiser.h"
#include "base/memory.h"
#include "base/status.h"
#include "engines/dense/dense.h"
#include "tensor/device.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Sums of squares are taken over blocks of this many elements, in LANES interleaved partial sums,
 * and the blocks are added in order: the same bits at any number of threads. */
enum { BLOCK = 4096, LANES = 8, NAME_PREFIX = 16 };

struct attn_optimiser {
  attn_adamw options;
  attn_parameter **parameters; /* [count] that are learnt; behind them [statistics] */
  int64_t count, statistics;
  int64_t step;
  attn_tensor *m, *v; /* [count] */
  double *block_sums; /* [blocks of the largest parameter] */
  attn_gpu *gpu;      /* where the parameters are; NULL: the processor */
  double *gpu_sums;   /* there: a sum of squares for each parameter, and scratch behind them */
  const attn_tensor **gradients; /* [count], of the parameters: for it */
  char **names;                  /* [1 + 2 count] of the state's tensors */
};

/* -- Checks -- */

static attn_status check_options(const attn_adamw *options) {
  const struct {
    const char *name, *range;
    bool good;
    double value;
  } checks[] = {
      {"beta1", "[0, 1)", options->beta1 >= 0 && options->beta1 < 1, options->beta1},
      {"beta2", "[0, 1)", options->beta2 >= 0 && options->beta2 < 1, options->beta2},
      {"epsilon", "(0, inf)", options->epsilon > 0 && isfinite(options->epsilon), options->epsilon},
      {"weight_decay", "[0, inf)", options->weight_decay >= 0 && isfinite(options->weight_decay),
       options->weight_decay},
      {"clip", "[0, inf)", options->clip >= 0 && isfinite(options->clip), options->clip},
  };
  for (size_t i = 0; i < sizeof checks / sizeof *checks; ++i)
    if (!checks[i].good)
      return attn_fail(ATTN_INVALID_ARGUMENT, "AdamW: %s %g is not in %s", checks[i].name,
                       checks[i].value, checks[i].range);
  return ATTN_OK;
}

static bool same_shape(const attn_tensor *a, const attn_tensor *b) {
  return a->rank == b->rank && memcmp(a->shape, b->shape, (size_t)a->rank * sizeof *a->shape) == 0;
}

static attn_status check_parameter(const attn_parameter *parameter) {
  const attn_tensor *value = &parameter->value, *gradient = &parameter->gradient;
  if (!parameter->name)
    return attn_fail(ATTN_INVALID_ARGUMENT, "optimiser: a parameter has no name");
  if (value->dtype != ATTN_F32 && value->dtype != ATTN_F64)
    return attn_fail(ATTN_UNSUPPORTED, "optimiser: %s is %s; masters are float32 or float64",
                     parameter->name, attn_dtype_name(value->dtype));
  if (gradient->dtype != value->dtype)
    return attn_fail(ATTN_INVALID_ARGUMENT, "optimiser: %s is %s, its gradient %s", parameter->name,
                     attn_dtype_name(value->dtype), attn_dtype_name(gradient->dtype));
  if (!same_shape(value, gradient))
    return attn_fail(ATTN_INVALID_SHAPE, "optimiser: %s and its gradient differ in shape",
                     parameter->name);
  if (!attn_tensor_is_contiguous(value) || !attn_tensor_is_contiguous(gradient))
    return attn_fail(ATTN_INVALID_SHAPE, "optimiser: %s or its gradient is not contiguous",
                     parameter->name);
  if (!attn_same_device(value->device, gradient->device))
    return attn_fail(ATTN_INVALID_ARGUMENT, "optimiser: %s and its gradient are on two devices",
                     parameter->name);
  if (attn_tensor_count(value) && (!value->data || !gradient->data))
    return attn_fail(ATTN_INVALID_ARGUMENT, "optimiser: %s or its gradient has no data",
                     parameter->name);
  return ATTN_OK;
}

/* -- Creating -- */

static int64_t blocks_of(int64_t elements) {
  return (elements + BLOCK - 1) / BLOCK;
}

static char *state_name(const char *prefix, const char *name) {
  size_t size = NAME_PREFIX + strlen(name) + 1;
  char *text = attn_alloc(size);
  if (text) snprintf(text, size, "%s%s", prefix, name);
  return text;
}

static attn_status allocate_names(attn_optimiser *optimiser) {
  optimiser->names = attn_alloc_array((size_t)(1 + 2 * optimiser->count), sizeof(char *));
  if (!optimiser->names) return ATTN_OUT_OF_MEMORY;
  optimiser->names[0] = attn_strdup("optimiser.step");
  if (!optimiser->names[0]) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < optimiser->count; ++i) {
    char **pair = optimiser->names + 1 + 2 * i;
    pair[0] = state_name("optimiser.m.", optimiser->parameters[i]->name);
    pair[1] = state_name("optimiser.v.", optimiser->parameters[i]->name);
    if (!pair[0] || !pair[1]) return ATTN_OUT_OF_MEMORY;
  }
  return ATTN_OK;
}

static attn_status allocate(attn_optimiser *optimiser, attn_parameter *const *parameters) {
  int64_t count = optimiser->count, most_blocks = 1, all = count + optimiser->statistics;
  optimiser->parameters = attn_alloc_array((size_t)all, sizeof *parameters);
  if (!optimiser->parameters) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0, learnt = 0, measured = count; i < all; ++i)
    optimiser->parameters[parameters[i]->statistic ? measured++ : learnt++] = parameters[i];
  optimiser->m = attn_alloc_array((size_t)count, sizeof *optimiser->m);
  optimiser->v = attn_alloc_array((size_t)count, sizeof *optimiser->v);
  if (!optimiser->m || !optimiser->v) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count; ++i) {
    const attn_tensor *value = &optimiser->parameters[i]->value;
    ATTN_TRY(attn_tensor_create_on(value->device, value->dtype, value->rank, value->shape,
                                   &optimiser->m[i]));
    ATTN_TRY(attn_tensor_create_on(value->device, value->dtype, value->rank, value->shape,
                                   &optimiser->v[i]));
    int64_t blocks = blocks_of(attn_tensor_count(value));
    if (blocks > most_blocks) most_blocks = blocks;
  }
  int64_t sums = most_blocks > count ? most_blocks : count;
  optimiser->block_sums = attn_alloc_array((size_t)sums, sizeof(double));
  if (!optimiser->block_sums) return ATTN_OUT_OF_MEMORY;
  attn_device device = optimiser->parameters[0]->value.device;
  if (attn_is_cuda(device)) {
    optimiser->gpu = attn_gpu_of(&optimiser->parameters[0]->value);
    optimiser->gpu_sums = attn_device_alloc(
        device, (size_t)(count + ATTN_CUDA_TABLE * ATTN_CUDA_PARTS) * sizeof(double));
    optimiser->gradients = attn_alloc_array((size_t)count, sizeof *optimiser->gradients);
    if (!optimiser->gpu_sums || !optimiser->gradients) return ATTN_OUT_OF_MEMORY;
    for (int64_t i = 0; i < count; ++i)
      optimiser->gradients[i] = &optimiser->parameters[i]->gradient;
  }
  return allocate_names(optimiser);
}

attn_status attn_optimiser_create(const attn_adamw *options, attn_parameter *const *parameters,
                                  int64_t count, attn_optimiser **optimiser) {
  *optimiser = NULL;
  ATTN_TRY(check_options(options));
  int64_t statistics = 0;
  for (int64_t i = 0; i < count; ++i) ATTN_TRY(check_parameter(parameters[i]));
  for (int64_t i = 0; i < count; ++i) statistics += parameters[i]->statistic;
  if (count - statistics < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "optimiser: there are no parameters");
  attn_optimiser *fresh = attn_alloc_zero(sizeof *fresh);
  if (!fresh) return ATTN_OUT_OF_MEMORY;
  fresh->options = *options;
  fresh->count = count - statistics;
  fresh->statistics = statistics;
  attn_status status = allocate(fresh, parameters);
  if (status == ATTN_OK)
    *optimiser = fresh;
  else
    attn_optimiser_destroy(fresh);
  return status;
}

attn_status attn_optimiser_create_trained(const attn_adamw *options, attn_parameter *parameters,
                                          int64_t count, attn_optimiser **optimiser) {
  attn_parameter **trained = attn_alloc_array((size_t)count, sizeof *trained);
  int64_t found = 0;
  if (!trained) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count; ++i)
    if (parameters[i].gradient.data) trained[found++] = &parameters[i];
  attn_status status = attn_optimiser_create(options, trained, found, optimiser);
  attn_free(trained);
  return status;
}

void attn_optimiser_destroy(attn_optimiser *optimiser) {
  if (!optimiser) return;
  for (int64_t i = 0; i < optimiser->count; ++i) {
    if (optimiser->m) attn_tensor_destroy(&optimiser->m[i]);
    if (optimiser->v) attn_tensor_destroy(&optimiser->v[i]);
  }
  for (int64_t i = 0; optimiser->names && i < 1 + 2 * optimiser->count; ++i)
    attn_free(optimiser->names[i]);
  if (optimiser->gpu_sums)
    attn_device_free(optimiser->parameters[0]->value.device, optimiser->gpu_sums);
  attn_free(optimiser->names);
  attn_free(optimiser->gradients);
  attn_free(optimiser->parameters);
  attn_free(optimiser->block_sums);
  attn_free(optimiser->m);
  attn_free(optimiser->v);
  attn_free(optimiser);
}

/* -- Kernels over a range of elements, once for each dtype -- */

/* What one update needs besides the arrays; see the equations in optimiser.h. */
typedef struct update {
  double scale, beta1, beta2, epsilon;
  double rate;       /* r / (1 - beta1^t) */
  double correction; /* 1 / sqrt(1 - beta2^t) */
  double decay;      /* r weight_decay, 0 without decay */
} update;

/* In float32 all factors are rounded once, outside the loop; 1 - beta is rounded from float64 so
 * that beta2 = 0.9999 keeps its digits. */
#define DEFINE_KERNELS(type, suffix, square_root)                                                  \
  static double squares_##suffix(const type *x, int64_t count) {                                   \
    double lanes[LANES] = {0};                                                                     \
    int64_t whole = count / LANES * LANES;                                                         \
    for (int64_t i = 0; i < whole; i += LANES)                                                     \
      for (int lane = 0; lane < LANES; ++lane)                                                     \
        lanes[lane] += (double)x[i + lane] * (double)x[i + lane];                                  \
    for (int64_t i = whole; i < count; ++i) lanes[i - whole] += (double)x[i] * (double)x[i];       \
    double sum = 0;                                                                                \
    for (int lane = 0; lane < LANES; ++lane) sum += lanes[lane];                                   \
    return sum;                                                                                    \
  }                                                                                                \
  static void update_##suffix(type *restrict w, const type *restrict g, type *restrict m,          \
                              type *restrict v, int64_t count, const update *u) {                  \
    const type scale = (type)u->scale, beta1 = (type)u->beta1, beta2 = (type)u->beta2;             \
    const type rest1 = (type)(1 - u->beta1), rest2 = (type)(1 - u->beta2);                         \
    const type rate = (type)u->rate, correction = (type)u->correction;                             \
    const type epsilon = (type)u->epsilon, decay = (type)u->decay;                                 \
    for (int64_t i = 0; i < count; ++i) {                                                          \
      type gradient = scale * g[i];                                                                \
      type first = beta1 * m[i] + rest1 * gradient;                                                \
      type second = beta2 * v[i] + rest2 * gradient * gradient;                                    \
      m[i] = first;                                                                                \
      v[i] = second;                                                                               \
      w[i] -= rate * first / (square_root(second) * correction + epsilon) + decay * w[i];          \
    }                                                                                              \
  }

DEFINE_KERNELS(float, f32, sqrtf)
DEFINE_KERNELS(double, f64, sqrt)

/* Elements of one block: [start, start + length). */
static int64_t block_length(int64_t elements, int64_t block) {
  int64_t left = elements - block * BLOCK;
  return left < BLOCK ? left : BLOCK;
}

/* Below this many blocks, waking threads costs more than it saves. */
enum { BLOCKS_WORTH_THREADS = 16 };

static double sum_of_squares(const attn_tensor *tensor, double *block_sums) {
  int64_t elements = attn_tensor_count(tensor), blocks = blocks_of(elements);
#pragma omp parallel for num_threads(attn_get_threads())                                           \
    schedule(static) if (blocks >= BLOCKS_WORTH_THREADS)
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t length = block_length(elements, b);
    block_sums[b] = tensor->dtype == ATTN_F32
                        ? squares_f32((const float *)tensor->data + b * BLOCK, length)
                        : squares_f64((const double *)tensor->data + b * BLOCK, length);
  }
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += block_sums[b];
  return sum;
}

static void update_parameter(const attn_parameter *parameter, const attn_tensor *m,
                             const attn_tensor *v, const update *u) {
  int64_t elements = attn_tensor_count(m), blocks = blocks_of(elements);
#pragma omp parallel for num_threads(attn_get_threads())                                           \
    schedule(static) if (blocks >= BLOCKS_WORTH_THREADS)
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t start = b * BLOCK, length = block_length(elements, b);
    if (m->dtype == ATTN_F32)
      update_f32((float *)parameter->value.data + start,
                 (const float *)parameter->gradient.data + start, (float *)m->data + start,
                 (float *)v->data + start, length, u);
    else
      update_f64((double *)parameter->value.data + start,
                 (const double *)parameter->gradient.data + start, (double *)m->data + start,
                 (double *)v->data + start, length, u);
  }
}

/* -- One step -- */

/* Sums of squares of all gradients, one each, from the GPU; they come together. */
static attn_status squares_on_gpu(const attn_optimiser *o) {
  const attn_gpu *gpu = o->gpu;
  ATTN_TRY(attn_gpu_check(gpu, gpu->cuda->sum_squares_all(o->gradients, (int)o->count, o->gpu_sums,
                                                          o->gpu_sums + o->count,
                                                          attn_gpu_stream(gpu))));
  attn_device device = o->parameters[0]->value.device;
  ATTN_TRY(attn_device_copy(device, o->block_sums, o->gpu_sums, (size_t)o->count * sizeof(double)));
  return attn_device_synchronize(device);
}

/* The sum of squares of gradient i; on a GPU after squares_on_gpu. */
static double squares_of(const attn_optimiser *o, int64_t i) {
  return o->gpu ? o->block_sums[i] : sum_of_squares(&o->parameters[i]->gradient, o->block_sums);
}

double attn_optimiser_norm(const attn_optimiser *optimiser) {
  double sum = 0;
  if (optimiser->gpu && squares_on_gpu(optimiser) != ATTN_OK) return NAN;
  for (int64_t i = 0; i < optimiser->count; ++i) sum += squares_of(optimiser, i);
  return sqrt(sum);
}

static attn_status fail_not_finite(const attn_optimiser *optimiser) {
  for (int64_t i = 0; i < optimiser->count; ++i)
    if (!isfinite(squares_of(optimiser, i)))
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "optimiser: the gradient of %s is not finite at step %lld; nothing was "
                       "changed",
                       optimiser->parameters[i]->name, (long long)optimiser->step);
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "optimiser: the norm of all gradients overflows at step %lld; nothing was "
                   "changed",
                   (long long)optimiser->step);
}

static attn_status renew_weights(attn_optimiser *optimiser) {
  for (int64_t i = 0; i < optimiser->count; ++i) {
    attn_parameter *parameter = optimiser->parameters[i];
    if (parameter->weight) ATTN_TRY(attn_weight_set(parameter->weight, &parameter->value));
  }
  return ATTN_OK;
}

/* The same by one launch, which also renews the weight's compute form and zeroes the gradient. */
static attn_status update_on_gpu(attn_optimiser *o, int64_t i, double learning_rate,
                                 const update *u) {
  attn_parameter *p = o->parameters[i];
  attn_gpu *gpu = o->gpu;
  double decay = p->decay ? o->options.weight_decay : 0, t = (double)o->step;
  attn_tensor compute = p->weight ? attn_weight_values(p->weight) : (attn_tensor){0};
  bool copied = compute.data && compute.data != p->value.data; /* the masters in another dtype */
  return attn_gpu_check(gpu,
                        gpu->cuda->adamw(&p->value, &p->gradient, &o->m[i], &o->v[i],
                                         copied ? &compute : NULL, learning_rate, u->beta1,
                                         u->beta2, u->epsilon, decay, 1 - pow(u->beta1, t),
                                         1 - pow(u->beta2, t), u->scale, attn_gpu_stream(gpu)));
}

/* value -= share gradient_scale gradient, of what is measured. */
static attn_status update_statistics(attn_optimiser *o, double gradient_scale) {
  const double factor = -ATTN_STATISTIC_SHARE * gradient_scale;
  for (int64_t i = o->count; i < o->count + o->statistics; ++i) {
    attn_tensor *w = &o->parameters[i]->value, *g = &o->parameters[i]->gradient;
    if (o->gpu) {
      attn_cuda_stream stream = attn_gpu_stream(o->gpu);
      ATTN_TRY(attn_gpu_check(o->gpu, o->gpu->cuda->add(w, 1, w, factor, g, stream)));
      size_t size = (size_t)attn_tensor_count(g) * attn_dtype_size(g->dtype);
      ATTN_TRY(attn_device_zero(g->device, g->data, size));
      continue;
    }
    for (int64_t j = 0; j < attn_tensor_count(w); ++j)
      if (w->dtype == ATTN_F32)
        ((float *)w->data)[j] += (float)factor * ((const float *)g->data)[j];
      else
        ((double *)w->data)[j] += factor * ((const double *)g->data)[j];
  }
  return ATTN_OK;
}

attn_status attn_optimiser_step(attn_optimiser *optimiser, double learning_rate,
                                double gradient_scale, attn_step_info *info) {
  const attn_adamw *options = &optimiser->options;
  if (!(learning_rate >= 0 && isfinite(learning_rate)) || !isfinite(gradient_scale))
    return attn_fail(ATTN_INVALID_ARGUMENT, "optimiser: learning rate %g, gradient scale %g",
                     learning_rate, gradient_scale);
  double norm = fabs(gradient_scale) * attn_optimiser_norm(optimiser);
  if (!isfinite(norm)) return fail_not_finite(optimiser);
  bool clipped = options->clip > 0 && norm > options->clip;
  if (info) *info = (attn_step_info){.norm = norm, .clipped = clipped};

  double t = (double)++optimiser->step;
  update u = {
      .scale = gradient_scale * (clipped ? options->clip / norm : 1),
      .beta1 = options->beta1,
      .beta2 = options->beta2,
      .epsilon = options->epsilon,
      .rate = learning_rate / (1 - pow(options->beta1, t)),
      .correction = 1 / sqrt(1 - pow(options->beta2, t)),
  };
  for (int64_t i = 0; i < optimiser->count; ++i) {
    const attn_parameter *parameter = optimiser->parameters[i];
    u.decay = parameter->decay ? learning_rate * options->weight_decay : 0;
    if (optimiser->gpu)
      ATTN_TRY(update_on_gpu(optimiser, i, learning_rate, &u));
    else
      update_parameter(parameter, &optimiser->m[i], &optimiser->v[i], &u);
  }
  ATTN_TRY(update_statistics(optimiser, gradient_scale));
  return optimiser->gpu ? ATTN_OK : renew_weights(optimiser);
}

bool attn_optimiser_zeroes(const attn_optimiser *optimiser) {
  return optimiser->gpu != NULL;
}

void attn_optimiser_zero_gradients(attn_optimiser *optimiser) {
  for (int64_t i = 0; i < optimiser->count + optimiser->statistics; ++i) {
    const attn_tensor *gradient = &optimiser->parameters[i]->gradient;
    size_t size = (size_t)attn_tensor_count(gradient) * attn_dtype_size(gradient->dtype);
    if (size) (void)attn_device_zero(gradient->device, gradient->data, size);
  }
}

int64_t attn_optimiser_steps(const attn_optimiser *optimiser) {
  return optimiser->step;
}

/* -- The state -- */

int64_t attn_optimiser_state_count(const attn_optimiser *optimiser) {
  return 1 + 2 * optimiser->count;
}

void attn_optimiser_state(attn_optimiser *optimiser, attn_named_tensor *tensors) {
  tensors[0].name = optimiser->names[0];
  attn_tensor_wrap(&optimiser->step, ATTN_I64, 0, NULL, &tensors[0].tensor);
  for (int64_t i = 0; i < optimiser->count; ++i) {
    char **names = optimiser->names + 1 + 2 * i;
    tensors[1 + 2 * i] = (attn_named_tensor){names[0], optimiser->m[i]};
    tensors[2 + 2 * i] = (attn_named_tensor){names[1], optimiser->v[i]};
  }
}

/* The tensor of the file that fits a tensor of the state. */
static attn_status find_like(const attn_safetensors *file, const char *name,
                             const attn_tensor *state, attn_tensor *found) {
  attn_status status = attn_safetensors_find(file, name, found);
  if (status != ATTN_OK) return attn_fail_in(ATTN_BAD_FORMAT, "optimiser state");
  if (found->dtype != state->dtype || !same_shape(found, state))
    return attn_fail(ATTN_BAD_FORMAT,
                     "optimiser state: %s has another dtype or shape than the "
                     "parameter",
                     name);
  return ATTN_OK;
}

attn_status attn_optimiser_load(attn_optimiser *optimiser, const attn_safetensors *file) {
  attn_tensor step, found, *moments[2] = {optimiser->m, optimiser->v};
  attn_tensor_wrap(&optimiser->step, ATTN_I64, 0, NULL, &found);
  ATTN_TRY(find_like(file, optimiser->names[0], &found, &step));
  if (*(const int64_t *)step.data < 0)
    return attn_fail(ATTN_BAD_FORMAT, "optimiser state: step %lld is negative",
                     (long long)*(const int64_t *)step.data);
  for (int pass = 0; pass < 2; ++pass) /* first check all, then take all */
    for (int64_t i = 0; i < 2 * optimiser->count; ++i) {
      attn_tensor *state = &moments[i % 2][i / 2];
      ATTN_TRY(find_like(file, optimiser->names[1 + i], state, &found));
      if (pass == 1) ATTN_TRY(attn_tensor_copy(&found, state));
    }
  optimiser->step = *(const int64_t *)step.data;
  return ATTN_OK;
}
