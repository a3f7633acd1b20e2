/* /v1/embeddings. */
#include "attn/embedding.h"
#include "base/memory.h"
#include "base/status.h"
#include "server/exchange.h"

#include <string.h>

/* The tokens of all inputs, one behind the other, and their embeddings. */
typedef struct embeddings {
  int32_t *tokens;
  int64_t *offsets; /* [count + 1] */
  int64_t count, room, size;
  float *values; /* [count, size] */
} embeddings;

static void free_embeddings(embeddings *em) {
  attn_free(em->tokens);
  attn_free(em->offsets);
  attn_free(em->values);
}

static attn_status make_room(embeddings *em, int64_t more) {
  int64_t used = em->offsets[em->count];
  if (used + more <= em->room) return ATTN_OK;
  int64_t room = 2 * (used + more);
  int32_t *tokens = attn_realloc(em->tokens, (size_t)room * sizeof *tokens);
  if (!tokens) return ATTN_OUT_OF_MEMORY;
  em->tokens = tokens;
  em->room = room;
  return ATTN_OK;
}

static attn_status add_input(const attn_model *model, const attn_request_input *input,
                             embeddings *em) {
  int64_t count = input->token_count, at = em->offsets[em->count];
  if (input->text)
    ATTN_TRY(
        attn_model_encode_for_embedding(model, input->text, input->size, NULL, 0, &count, NULL));
  ATTN_TRY(make_room(em, count));
  if (input->text)
    ATTN_TRY(attn_model_encode_for_embedding(model, input->text, input->size, em->tokens + at,
                                             count, &count, NULL));
  else
    memcpy(em->tokens + at, input->tokens, (size_t)count * sizeof *em->tokens);
  em->offsets[++em->count] = at + count;
  return ATTN_OK;
}

static attn_status compute(const attn_model *model, const attn_request *request, embeddings *em) {
  size_t count = (size_t)request->input_count;
  em->size = attn_model_embedding_size(model);
  em->offsets = attn_alloc_array(count + 1, sizeof *em->offsets);
  em->values = attn_alloc_array(count * (size_t)em->size, sizeof *em->values);
  if (!em->offsets || !em->values) return ATTN_OUT_OF_MEMORY;
  for (int i = 0; i < request->input_count; ++i)
    ATTN_TRY(add_input(model, &request->inputs[i], em));
  return attn_model_embed(model, em->tokens, em->offsets, em->count, NULL, em->values);
}

static json_t *numbers(const float *values, int64_t size) {
  json_t *list = json_array();
  for (int64_t i = 0; i < size; ++i) json_array_append_new(list, json_real((double)values[i]));
  return list;
}

static json_t *answer_of(const attn_exchange *e, const embeddings *em) {
  json_t *data = json_array();
  for (int64_t i = 0; i < em->count; ++i)
    json_array_append_new(data, json_pack("{s:s, s:I, s:o}", "object", "embedding", "index",
                                          (json_int_t)i, "embedding",
                                          numbers(em->values + i * em->size, em->size)));
  json_int_t tokens = em->offsets[em->count];
  return json_pack("{s:s, s:o, s:s, s:{s:I, s:I}}", "object", "list", "data", data, "model",
                   e->server->options.model_name, "usage", "prompt_tokens", tokens, "total_tokens",
                   tokens);
}

/* One request at a time: each uses all threads. */
static enum MHD_Result embed(attn_exchange *e) {
  embeddings em = {0};
  pthread_mutex_lock(&e->server->embedding);
  attn_set_patience(e, true);
  attn_status status = compute(e->server->model, &e->request, &em);
  attn_set_patience(e, false);
  pthread_mutex_unlock(&e->server->embedding);
  enum MHD_Result result = MHD_NO;
  if (status == ATTN_OK)
    result = attn_send_json(e, MHD_HTTP_OK, answer_of(e, &em));
  else
    attn_refuse_failed(e, status);
  free_embeddings(&em);
  return result;
}

enum MHD_Result attn_answer_embeddings(attn_exchange *e) {
  return attn_read_request(e) ? embed(e) : MHD_NO;
}
