/* Text from a language model: load, feed a prompt, sample, fork and rewind.
 *   example_generate [MODEL_DIRECTORY] */
#include <attn/attn.h>

#include <stdio.h>
#include <string.h>

static attn_status feed_text(attn_session *session, const char *text) {
  int32_t tokens[256];
  int64_t count = 0;
  for (; text[count] && count < 256; ++count) tokens[count] = (unsigned char)text[count];
  return attn_session_feed(session, tokens, count);
}

static attn_status write_on(attn_session *session, const attn_sampling *sampling, int count) {
  for (int i = 0; i < count; ++i) {
    int32_t token;
    attn_status status = attn_session_sample(session, sampling, &token);
    if (status == ATTN_OK) status = attn_session_feed(session, &token, 1);
    if (status != ATTN_OK) return status;
    putchar(token);
  }
  putchar('\n');
  return ATTN_OK;
}

int main(int argc, char **argv) {
  static const char tiny[] = "{\"vocab_size\": 256, \"hidden_size\": 64, \"num_hidden_layers\": 2}";
  attn_model *model = NULL;
  attn_session *session = NULL, *fork = NULL;
  attn_sampling sampling = ATTN_SAMPLING_INIT;
  sampling.temperature = 0.8;

  /* without a directory: random weights, which write noise */
  attn_status status = argc > 1 ? attn_model_load(argv[1], ATTN_BF16, &model)
                                : attn_model_create(tiny, 1, ATTN_F32, &model);
  if (status == ATTN_OK) status = attn_session_create(model, NULL, &session);
  if (status == ATTN_OK) status = feed_text(session, "In the beginning ");
  if (status == ATTN_OK) status = attn_session_fork(session, &fork); /* a second continuation */
  if (status == ATTN_OK) status = write_on(session, &sampling, 80);
  sampling.seed = 2;
  if (status == ATTN_OK) status = write_on(fork, &sampling, 80);
  /* back to after the prompt, whatever the mixer */
  if (status == ATTN_OK)
    status = attn_session_rewind(session, (int64_t)strlen("In the beginning "));
  if (status == ATTN_OK) status = write_on(session, &sampling, 80); /* the fork's words again */
  if (status != ATTN_OK) fprintf(stderr, "%s\n", attn_error_message());

  attn_session_destroy(fork);
  attn_session_destroy(session);
  attn_model_destroy(model);
  return status != ATTN_OK;
}
