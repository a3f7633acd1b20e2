/* Saving a model as GGUF. A file's tensor may hold several parameters (all experts of a layer), and
 * its rows may have another order than ours: rows are looked up in the order of the file, packed a
 * few at a time and written. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"
#include "tensor/device.h"

#include <math.h>
#include <string.h>

enum { PIECE_ROWS = 256 };

typedef struct target {
  const char *name; /* of places[first] */
  int64_t first;    /* the first of its parameters */
  int64_t members, rows, columns;
  const attn_place *place; /* the first's */
  attn_block_type type;
  int rank;
} target;

typedef struct plan {
  const attn_model *model;
  attn_weight_type wanted;
  attn_place *places; /* of each parameter */
  int64_t *target_of; /* of each parameter */
  target *targets;
  int64_t count;
} plan;

/* Types ------------------------------------------------------------------------------------------
 */

static const struct {
  attn_block_type block;
  uint32_t file_type; /* of general.file_type */
} types[ATTN_WEIGHT_TYPES] = {
    [ATTN_WEIGHTS_F32] = {ATTN_BLOCK_F32, 0},    [ATTN_WEIGHTS_F16] = {ATTN_BLOCK_F16, 1},
    [ATTN_WEIGHTS_BF16] = {ATTN_BLOCK_BF16, 32}, [ATTN_WEIGHTS_Q8_0] = {ATTN_BLOCK_Q8_0, 7},
    [ATTN_WEIGHTS_Q4_0] = {ATTN_BLOCK_Q4_0, 2},
};

/* As ggml's converters: what is small, and what small differences of would change much. */
static bool stays_f32(const target *t) {
  static const char *const parts[] = {"norm", ".ffn_gate_inp", ".ssm_conv1d.", ".shortconv.conv."};
  if (t->rank == 1) return true;
  for (size_t i = 0; i < sizeof parts / sizeof *parts; ++i)
    if (strstr(t->name, parts[i])) return true;
  return false;
}

/* As the file that the model was loaded from has a parameter; float8, which GGUF has not, becomes
 * bfloat16. */
static attn_block_type stored_type(const attn_model *model, int64_t index) {
  const attn_parameter *p = &model->parameters[index];
  attn_dtype dtype = p->value.dtype;
  attn_stored stored;
  if (p->blocks) return p->block_type == ATTN_BLOCK_F8_E4M3 ? ATTN_BLOCK_BF16 : p->block_type;
  bool found = attn_model_find_stored(model, index, &stored);
  if (found && !stored.in_blocks) dtype = stored.dtype; /* float16 was widened */
  for (int i = 0; found && stored.in_blocks && i < ATTN_WEIGHT_TYPES; ++i)
    if (types[i].block == stored.type) return stored.type; /* so were transposed blocks */
  if (dtype == ATTN_F16) return ATTN_BLOCK_F16;
  return dtype == ATTN_BF16 || attn_dtype_size(dtype) == 1 ? ATTN_BLOCK_BF16 : ATTN_BLOCK_F32;
}

static attn_block_type choose_type(const plan *p, const target *t) {
  if (stays_f32(t)) return ATTN_BLOCK_F32;
  if (p->wanted == ATTN_WEIGHTS_AS_STORED) return stored_type(p->model, t->first);
  attn_block_type type = types[p->wanted].block;
  return t->columns % attn_block_get_format(type)->elements ? ATTN_BLOCK_F16 : type;
}

/* general.file_type: the type that most weights have; as the source says where they stay. */
static void add_file_type(const plan *p, attn_gguf_draft *draft) {
  int64_t said = -1, largest = 0;
  attn_block_type type = ATTN_BLOCK_F32;
  attn_weight_type found = p->wanted;
  if (found == ATTN_WEIGHTS_AS_STORED && p->model->source.gguf)
    attn_gguf_int(p->model->source.gguf, "general.file_type", ATTN_OPTIONAL, 0, UINT32_MAX, &said);
  if (said >= 0) {
    attn_gguf_add_u32(draft, "general.file_type", (uint32_t)said);
    return;
  }
  for (int64_t i = 0; i < p->count; ++i)
    if (p->targets[i].rows * p->targets[i].columns > largest) {
      largest = p->targets[i].rows * p->targets[i].columns;
      type = p->targets[i].type;
    }
  for (int i = 1; found == ATTN_WEIGHTS_AS_STORED && i < ATTN_WEIGHT_TYPES; ++i)
    if (types[i].block == type) found = (attn_weight_type)i;
  if (found != ATTN_WEIGHTS_AS_STORED)
    attn_gguf_add_u32(draft, "general.file_type", types[found].file_type);
}

/* Tensors ----------------------------------------------------------------------------------------
 */

static int64_t find_shared(const plan *p, const char *name) {
  for (int64_t i = p->count - 1; i >= 0; --i)
    if (strcmp(p->targets[i].name, name) == 0) return i;
  return -1;
}

static attn_status place_parameter(plan *p, int64_t index) {
  const attn_parameter_shape *shape = &p->model->shapes[index];
  attn_place *place = &p->places[index];
  ATTN_TRY(attn_family_place(&p->model->config, shape, ATTN_IN_GGUF, place));
  int64_t at = place->rows.part ? find_shared(p, place->name) : -1;
  if (at < 0) {
    at = p->count++;
    p->targets[at] = (target){.name = place->name,
                              .first = index,
                              .columns = shape->rank == 2 ? shape->shape[1] : 1,
                              .place = place,
                              .rank = shape->rank};
  }
  target *t = &p->targets[at];
  if (place->transposed) {
    *t = (target){.name = place->name, .first = index, .place = place, .rank = shape->rank};
    t->members = 1;
    t->columns = place->transposed;
    t->rows = shape->shape[0] / place->transposed * shape->shape[1];
    p->target_of[index] = at;
    return ATTN_OK;
  }
  if (shape->rank != t->rank || (t->rank == 2 && shape->shape[1] != t->columns))
    return attn_fail(ATTN_INTERNAL, "%s: parts of different shapes", place->name);
  ++t->members;
  t->rows += shape->shape[0];
  p->target_of[index] = at;
  return ATTN_OK;
}

/* All experts are a tensor [experts, rows, columns], some matrices [heads, rows, columns];
 * everything else is [rows, columns]. */
static attn_status describe(const plan *p, target *t, attn_gguf_draft *draft) {
  int64_t flat[] = {t->rows, t->columns}, deep[] = {t->members, t->rows / t->members, t->columns};
  bool experts = t->rank == 2 && strstr(t->name, "_exps."), heads = t->place->heads > 0;
  if (heads) deep[0] = t->place->heads, deep[1] = t->rows / t->place->heads;
  t->type = choose_type(p, t);
  return attn_gguf_add_tensor(draft, t->name, t->type, experts || heads ? 3 : t->rank,
                              experts || heads ? deep : flat);
}

static attn_status plan_tensors(plan *p, attn_gguf_draft *draft) {
  size_t count = (size_t)p->model->parameter_count;
  p->places = attn_alloc_array(count, sizeof *p->places);
  p->target_of = attn_alloc_array(count, sizeof *p->target_of);
  p->targets = attn_alloc_array(count, sizeof *p->targets);
  if (!p->places || !p->target_of || !p->targets) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < p->model->parameter_count; ++i) ATTN_TRY(place_parameter(p, i));
  for (int64_t i = 0; i < p->count; ++i) ATTN_TRY(describe(p, &p->targets[i], draft));
  int64_t factors = attn_family_rope_count(&p->model->config);
  if (!factors) return ATTN_OK;
  return attn_gguf_add_tensor(draft, "rope_freqs.weight", ATTN_BLOCK_F32, 1, &factors);
}

static void free_plan(plan *p) {
  attn_free(p->places);
  attn_free(p->target_of);
  attn_free(p->targets);
}

/* Data -------------------------------------------------------------------------------------------
 */

/* Whose row each row of a tensor is. */
typedef struct row {
  const attn_parameter *parameter; /* NULL: nobody's */
  int64_t index;
} row;

static attn_status find_rows(const plan *p, int64_t tensor, row **rows) {
  const target *t = &p->targets[tensor];
  *rows = attn_alloc_array((size_t)t->rows, sizeof **rows);
  if (!*rows) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = t->first, left = t->members; left; ++i) {
    if (p->target_of[i] != tensor) continue;
    --left;
    for (int64_t r = 0; r < p->model->shapes[i].shape[0]; ++r) {
      int64_t at = attn_row_map_at(&p->places[i].rows, r);
      if (at < 0 || at >= t->rows) return attn_fail(ATTN_INTERNAL, "row %lld", (long long)at);
      (*rows)[at] = (row){&p->model->parameters[i], r};
    }
  }
  for (int64_t r = 0; r < t->rows; ++r)
    if (!(*rows)[r].parameter) return attn_fail(ATTN_INTERNAL, "no row %lld", (long long)r);
  return ATTN_OK;
}

/* One row in the target's blocks; the same blocks are copied. `numbers` has room for it. */
static attn_status pack_row(const target *t, const row *from, float *numbers, void *blocks) {
  const attn_parameter *p = from->parameter;
  const attn_block_format *format = attn_block_get_format(t->type);
  size_t size = (size_t)(t->columns / format->elements * format->bytes);
  if (p->blocks && p->block_type == t->type) {
    const char *stored = (const char *)p->blocks + (size_t)from->index * size;
    ATTN_TRY(attn_device_copy(p->value.device, blocks, stored, size));
    return attn_device_synchronize(p->value.device);
  }
  if (t->type == ATTN_BLOCK_F32) return attn_parameter_row(p, from->index, blocks);
  ATTN_TRY(attn_parameter_row(p, from->index, numbers));
  return attn_blocks_from_f32(t->type, numbers, blocks, t->columns);
}

static attn_status put_rows(const target *t, const row *rows, attn_gguf_sink *sink) {
  const attn_block_format *format = attn_block_get_format(t->type);
  size_t size = (size_t)(t->columns / format->elements * format->bytes);
  char *blocks = attn_alloc_array(PIECE_ROWS, size);
  float *numbers = attn_alloc_array(PIECE_ROWS, (size_t)t->columns * sizeof *numbers);
  attn_status status = blocks && numbers ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t first = 0; first < t->rows && status == ATTN_OK; first += PIECE_ROWS) {
    int64_t count = t->rows - first < PIECE_ROWS ? t->rows - first : PIECE_ROWS;
    int failed = 0;
#pragma omp parallel for num_threads(attn_get_threads()) reduction(+ : failed)
    for (int64_t r = 0; r < count; ++r)
      failed += pack_row(t, &rows[first + r], numbers + r * t->columns,
                         blocks + (size_t)r * size) != ATTN_OK;
    status = failed ? attn_fail(ATTN_UNSUPPORTED, "it cannot be written as %s", format->name)
                    : attn_gguf_put(sink, blocks, (size_t)count * size);
  }
  attn_free(blocks);
  attn_free(numbers);
  return status;
}

/* Columns of each head as rows. */
static attn_status put_transposed(const plan *p, const target *t, attn_gguf_sink *sink) {
  const attn_parameter *from = &p->model->parameters[t->first];
  const attn_block_format *format = attn_block_get_format(t->type);
  int64_t head = t->columns, columns = p->model->shapes[t->first].shape[1];
  size_t size = (size_t)(head / format->elements * format->bytes);
  float *rows = attn_alloc_array((size_t)(head + 1), (size_t)(columns > head ? columns : head) * 4);
  char *blocks = attn_alloc_array((size_t)columns, size);
  attn_status status = rows && blocks ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  float *row = rows ? rows + head * columns : NULL;
  for (int64_t first = 0; first < t->rows && status == ATTN_OK; first += columns) {
    for (int64_t i = 0; i < head && status == ATTN_OK; ++i)
      status = attn_parameter_row(from, first / columns * head + i, rows + i * columns);
    for (int64_t c = 0; c < columns && status == ATTN_OK; ++c) {
      for (int64_t i = 0; i < head; ++i) row[i] = rows[i * columns + c];
      if (t->type == ATTN_BLOCK_F32)
        memcpy(blocks + (size_t)c * size, row, size);
      else
        status = attn_blocks_from_f32(t->type, row, blocks + (size_t)c * size, head);
    }
    if (status == ATTN_OK) status = attn_gguf_put(sink, blocks, (size_t)columns * size);
  }
  attn_free(rows);
  attn_free(blocks);
  return status;
}

static attn_status put_negative_exp(const plan *p, const target *t, attn_gguf_sink *sink) {
  attn_tensor copy;
  ATTN_TRY(attn_parameter_copy(&p->model->parameters[t->first], ATTN_F64, &copy));
  attn_status status = ATTN_OK;
  for (int64_t i = 0; i < t->rows && status == ATTN_OK; ++i) {
    float number = (float)-exp(((const double *)copy.data)[i]);
    status = attn_gguf_put(sink, &number, sizeof number);
  }
  attn_tensor_destroy(&copy);
  return status;
}

static attn_status put_vector(const target *t, const row *rows, attn_gguf_sink *sink) {
  const attn_parameter *last = NULL;
  attn_tensor copy = {0};
  attn_status status = ATTN_OK;
  for (int64_t r = 0; r < t->rows && status == ATTN_OK; ++r) {
    if (rows[r].parameter != last) {
      attn_tensor_destroy(&copy);
      last = rows[r].parameter;
      status = attn_parameter_copy(last, ATTN_F32, &copy);
    }
    if (status == ATTN_OK)
      status = attn_gguf_put(sink, (const float *)copy.data + rows[r].index, sizeof(float));
  }
  attn_tensor_destroy(&copy);
  return status;
}

static attn_status put_factors(const attn_model_config *config, attn_gguf_sink *sink) {
  enum { MOST = 128 };
  float factors[MOST];
  int64_t count = attn_family_rope_count(config);
  if (count > MOST) return attn_fail(ATTN_UNSUPPORTED, "%lld factors", (long long)count);
  attn_family_rope_factors(config, factors);
  return attn_gguf_put(sink, factors, (size_t)count * sizeof *factors);
}

static attn_status fill(const void *context, int64_t tensor, attn_gguf_sink *sink) {
  const plan *p = context;
  row *rows = NULL;
  if (tensor == p->count) return put_factors(&p->model->config, sink);
  const target *t = &p->targets[tensor];
  if (t->place->transposed) return put_transposed(p, t, sink);
  if (t->place->negative_exp) return put_negative_exp(p, t, sink);
  attn_status status = find_rows(p, tensor, &rows);
  if (status == ATTN_OK)
    status = t->rank == 1 ? put_vector(t, rows, sink) : put_rows(t, rows, sink);
  attn_free(rows);
  return status;
}

/* Metadata ---------------------------------------------------------------------------------------
 */

static void add_architecture(const attn_model *model, attn_gguf_draft *draft) {
  const char *const *names = model->config.family->architectures;
  if (names) attn_gguf_add_string(draft, "general.architecture", names[0], strlen(names[0]));
}

/* The name of the source's directory, without what is above it. */
static void add_name(const attn_model *model, attn_gguf_draft *draft) {
  const char *path = model->source.path ? model->source.path : model->config.type;
  size_t size = strlen(path);
  while (size > 1 && path[size - 1] == '/') --size;
  const char *start = memrchr(path, '/', size);
  size_t skipped = start && size > 1 ? (size_t)(start - path) + 1 : 0;
  attn_gguf_add_string(draft, "general.name", path + skipped, size - skipped);
}

/* What a GGUF file says of its model stays, but for what is of the file. */
static void copy_general(const attn_gguf *file, attn_gguf_draft *draft) {
  static const char *const own[] = {"general.architecture", "general.file_type",
                                    "general.quantization_version", "general.alignment"};
  static const char prefix[] = "general.", sampling[] = "general.sampling.";
  for (int64_t i = 0; i < attn_gguf_key_count(file); ++i) {
    const char *key = attn_gguf_key(file, i);
    bool copied = strncmp(key, prefix, sizeof prefix - 1) == 0 &&
                  strncmp(key, sampling, sizeof sampling - 1) != 0;
    for (size_t k = 0; k < sizeof own / sizeof *own; ++k) copied &= strcmp(key, own[k]) != 0;
    if (copied) attn_gguf_add_copy(draft, file, i);
  }
}

static attn_status write_draft(plan *p, const char *path, int64_t shard_bytes,
                               attn_gguf_draft *draft, int *files) {
  enum { QUANTISATION = 2 }; /* of the block types as they are since 2023 */
  add_architecture(p->model, draft);
  if (p->model->source.gguf) copy_general(p->model->source.gguf, draft);
  if (!attn_gguf_has_key(draft, "general.name")) add_name(p->model, draft);
  ATTN_TRY(attn_family_config_to_gguf(&p->model->config, draft));
  ATTN_TRY(plan_tensors(p, draft));
  add_file_type(p, draft);
  attn_gguf_add_u32(draft, "general.quantization_version", QUANTISATION);
  ATTN_TRY(attn_model_text_to_gguf(p->model, draft));
  return attn_gguf_draft_write(draft, path, shard_bytes, fill, p, files);
}

attn_status attn_model_write_gguf(const attn_model *model, const char *path,
                                  const attn_gguf_options *options, int *files) {
  const attn_gguf_options usual = ATTN_GGUF_OPTIONS_INIT, *o = options ? options : &usual;
  if (!model || !path || (unsigned)o->type >= ATTN_WEIGHT_TYPES || o->shard_bytes < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "save_gguf: model or path is NULL, or type %d or shard_bytes %lld is unknown",
                     options ? (int)options->type : 0, options ? (long long)o->shard_bytes : 0);
  ATTN_TRY(attn_model_check_decoder(model, "save_gguf"));
  if (model->adapters)
    return attn_fail(ATTN_UNSUPPORTED, "save_gguf: the model has adapters that are not merged");
  plan p = {.model = model, .wanted = o->type};
  attn_gguf_draft *draft = attn_gguf_draft_create();
  attn_status status =
      draft ? write_draft(&p, path, o->shard_bytes, draft, files) : ATTN_OUT_OF_MEMORY;
  attn_gguf_draft_destroy(draft);
  free_plan(&p);
  return status;
}

attn_status attn_model_save_gguf(const attn_model *model, const char *path,
                                 const attn_gguf_options *options) {
  return attn_model_write_gguf(model, path, options, NULL);
}
