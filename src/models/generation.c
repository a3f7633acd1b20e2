#include "models/generation.h"
#include "base/status.h"
#include "files/json.h"
#include "models/model.h"

/* eos_token_id: a number or a list of them (text.c takes them). */
static attn_status check_ends(const json_t *json) {
  const json_t *ids = json_object_get(json, "eos_token_id");
  bool good = !ids || json_is_null(ids) || json_is_integer(ids) || json_is_array(ids);
  for (size_t i = 0; i < json_array_size(ids); ++i) good &= json_is_integer(json_array_get(ids, i));
  if (good) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "\"eos_token_id\": expected a token or a list of them");
}

typedef struct real {
  const char *key, *gguf;
  double least, most;
  attn_advice advice;
  size_t offset;
} real;

#define AT(field) offsetof(attn_sampling, field)
static const real reals[] = {
    {"temperature", "general.sampling.temp", 0, 1e3, ATTN_ADVISES_TEMPERATURE, AT(temperature)},
    {"top_p", "general.sampling.top_p", 1e-9, 1, ATTN_ADVISES_TOP_P, AT(top_p)},
    {"min_p", "general.sampling.min_p", 0, 1, ATTN_ADVISES_MIN_P, AT(min_p)},
    {"repetition_penalty", "general.sampling.penalty_repeat", 1e-3, 1e3, ATTN_ADVISES_PENALTY,
     AT(repetition_penalty)},
};
enum { REALS = sizeof reals / sizeof *reals };
static const char gguf_top_k[] = "general.sampling.top_k";
static const char gguf_window[] = "general.sampling.penalty_last_n";

static double *field(attn_sampling *sampling, const real *r) {
  return (double *)((char *)sampling + r->offset);
}

static attn_status read_reals(const json_t *json, attn_generation *g) {
  for (int i = 0; i < REALS; ++i) {
    const real *r = &reals[i];
    double value = -1;
    ATTN_TRY(attn_json_double(json, r->key, ATTN_OPTIONAL, r->least, r->most, &value));
    if (value < 0) continue;
    *field(&g->sampling, r) = value;
    g->advises |= r->advice;
  }
  return ATTN_OK;
}

attn_status attn_generation_read(const json_t *json, attn_generation *g) {
  bool samples = true;
  int64_t top_k = -1;
  *g = (attn_generation){.sampling = ATTN_SAMPLING_INIT};
  if (!json) return ATTN_OK;
  ATTN_TRY(check_ends(json));
  ATTN_TRY(read_reals(json, g));
  ATTN_TRY(attn_json_int(json, "top_k", ATTN_OPTIONAL, 0, INT32_MAX, &top_k));
  ATTN_TRY(attn_json_int(json, "repetition_window", ATTN_OPTIONAL, 0, INT32_MAX,
                         &g->sampling.repetition_window));
  ATTN_TRY(attn_json_int(json, "max_new_tokens", ATTN_OPTIONAL, 1, INT32_MAX, &g->max_new_tokens));
  ATTN_TRY(attn_json_bool(json, "do_sample", ATTN_OPTIONAL, &samples));
  if (top_k >= 0) {
    g->sampling.top_k = top_k;
    g->advises |= ATTN_ADVISES_TOP_K;
  }
  if (samples) return ATTN_OK;
  g->sampling.temperature = 0;
  g->advises |= ATTN_ADVISES_TEMPERATURE;
  return ATTN_OK;
}

void attn_generation_apply(const attn_generation *g, attn_sampling *sampling) {
  attn_sampling advised = g->sampling;
  for (int i = 0; i < REALS; ++i)
    if (g->advises & reals[i].advice) *field(sampling, &reals[i]) = *field(&advised, &reals[i]);
  if (g->advises & ATTN_ADVISES_TOP_K) sampling->top_k = advised.top_k;
  if (g->advises & ATTN_ADVISES_PENALTY) sampling->repetition_window = advised.repetition_window;
}

attn_status attn_model_default_sampling(const attn_model *model, attn_sampling *sampling) {
  if (!model || !sampling)
    return attn_fail(ATTN_INVALID_ARGUMENT, "default_sampling: model or sampling is NULL");
  *sampling = (attn_sampling)ATTN_SAMPLING_INIT;
  attn_generation_apply(&model->generation, sampling);
  return ATTN_OK;
}

/* GGUF -------------------------------------------------------------------------------------------
 * The keys: ggml-org/llama.cpp, pull request 17120. */

static attn_status copy_reals(const attn_gguf *file, json_t *json) {
  for (int i = 0; i < REALS; ++i) {
    double value = -1;
    ATTN_TRY(attn_gguf_double(file, reals[i].gguf, ATTN_OPTIONAL, reals[i].least, reals[i].most,
                              &value));
    if (value >= 0) json_object_set_new(json, reals[i].key, json_real(value));
  }
  return ATTN_OK;
}

/* penalty_last_n: -1 is the whole text, 0 no penalty at all. */
static attn_status copy_integers(const attn_gguf *file, json_t *json) {
  int64_t top_k = -1, window = -1;
  ATTN_TRY(attn_gguf_int(file, gguf_top_k, ATTN_OPTIONAL, INT32_MIN, INT32_MAX, &top_k));
  ATTN_TRY(attn_gguf_int(file, gguf_window, ATTN_OPTIONAL, INT32_MIN, INT32_MAX, &window));
  if (top_k >= 0) json_object_set_new(json, "top_k", json_integer(top_k));
  if (window > 0) json_object_set_new(json, "repetition_window", json_integer(window));
  if (window == 0) json_object_del(json, "repetition_penalty");
  return ATTN_OK;
}

/* Tokens at which a text ends, and that of its beginning. */
static attn_status copy_tokens(const attn_gguf *file, json_t *json) {
  static const char *const keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                     "tokenizer.ggml.eom_token_id"};
  json_t *ends = json_array();
  attn_status status = ATTN_OK;
  int64_t begin = -1;
  for (int i = 0; i < 3 && status == ATTN_OK; ++i) {
    int64_t id = -1;
    status = attn_gguf_int(file, keys[i], ATTN_OPTIONAL, 0, UINT32_MAX, &id);
    if (id >= 0 && id <= INT32_MAX) json_array_append_new(ends, json_integer(id));
  }
  if (json_array_size(ends)) json_object_set(json, "eos_token_id", ends);
  json_decref(ends);
  ATTN_TRY(status);
  ATTN_TRY(
      attn_gguf_int(file, "tokenizer.ggml.bos_token_id", ATTN_OPTIONAL, 0, UINT32_MAX, &begin));
  if (begin >= 0 && begin <= INT32_MAX)
    json_object_set_new(json, "bos_token_id", json_integer(begin));
  return ATTN_OK;
}

attn_status attn_generation_from_gguf(const attn_gguf *file, json_t **json) {
  json_t *made = json_object();
  if (!made) return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
  attn_status status = copy_tokens(file, made);
  if (status == ATTN_OK) status = copy_reals(file, made);
  if (status == ATTN_OK) status = copy_integers(file, made);
  if (status == ATTN_OK && json_object_size(made))
    *json = made;
  else
    json_decref(made);
  return status;
}

void attn_generation_to_gguf(const attn_generation *g, attn_gguf_draft *draft) {
  attn_sampling advised = g->sampling;
  for (int i = 0; i < REALS; ++i)
    if (g->advises & reals[i].advice)
      attn_gguf_add_f32(draft, reals[i].gguf, (float)*field(&advised, &reals[i]));
  if (g->advises & ATTN_ADVISES_TOP_K) attn_gguf_add_i32(draft, gguf_top_k, (int32_t)advised.top_k);
  if (g->advises & ATTN_ADVISES_PENALTY)
    attn_gguf_add_i32(draft, gguf_window,
                      advised.repetition_window ? (int32_t)advised.repetition_window : -1);
}
