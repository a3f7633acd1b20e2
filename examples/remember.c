/* A reactive model that learns to remember what it was told a turn before, and a conversation with
 * it: each turn is read alone, and the memory is all that is left of it.
 *
 *   example_remember */
#include "attn/reactive.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BOS, QUERY, ANSWER, EOS, YES, WHICH, FIRST_COLOUR, COLOURS = 6, LENGTH = 6, BATCH = 16 };
static const char *const words[] = {"",    "",     "",      "",     "yes",   "which?",
                                    "red", "blue", "green", "grey", "white", "black"};

static const char config[] =
    "{\"model_type\": \"reactive\", \"vocab_size\": 12, \"hidden_size\": 32, "
    "\"num_memory_slots\": 4, \"num_attention_heads\": 2, \"intermediate_size\": 64, "
    "\"head_norm\": true, \"bos_token_id\": 0, \"query_token_id\": 1, \"answer_token_id\": 2, "
    "\"eos_token_id\": 3}";

static void check(attn_status status) {
  if (status == ATTN_OK) return;
  fprintf(stderr, "%s: %s\n", attn_status_name(status), attn_error_message());
  exit(1);
}

/* "red": "yes"; "which?": "red". What follows the mark of the answer is to be learnt. */
static void say(int32_t text, int32_t answer, int32_t *tokens, int32_t *targets) {
  const int32_t turn[LENGTH] = {BOS, QUERY, text, ANSWER, answer, EOS};
  const int32_t wanted[LENGTH] = {-1, -1, -1, answer, EOS, -1};
  memcpy(tokens, turn, sizeof turn);
  memcpy(targets, wanted, sizeof wanted);
}

static void train(attn_reactive *model) {
  static int32_t tokens[2][BATCH * LENGTH], targets[2][BATCH * LENGTH], offsets[BATCH + 1];
  attn_reactive_trainer *trainer;
  attn_turns turns[2];
  double loss = 0;
  for (int b = 0; b <= BATCH; ++b) offsets[b] = b * LENGTH;
  for (int t = 0; t < 2; ++t)
    turns[t] = (attn_turns){
        .tokens = tokens[t], .targets = targets[t], .offsets = offsets, .sequences = BATCH};
  check(attn_reactive_trainer_create(model, NULL, &trainer));
  for (int step = 0; step < 200; ++step) {
    for (int b = 0; b < BATCH; ++b) {
      int32_t colour = FIRST_COLOUR + (step * 5 + b) % COLOURS;
      say(colour, YES, tokens[0] + b * LENGTH, targets[0] + b * LENGTH);
      say(WHICH, colour, tokens[1] + b * LENGTH, targets[1] + b * LENGTH);
    }
    check(attn_reactive_train_dialogues(trainer, turns, 2, 5e-3, &loss));
  }
  printf("trained, loss %.3f\n", loss);
  attn_reactive_trainer_destroy(trainer);
}

/* One turn; the answer's first word. */
static int32_t ask(attn_reactive_session *session, int32_t text) {
  int32_t answer[2] = {0};
  int64_t count;
  check(attn_reactive_session_ask(session, &text, 1, NULL, NULL, NULL, answer, 2, &count));
  printf("%-8s %s\n", words[text], words[answer[0]]);
  return answer[0];
}

int main(void) {
  attn_reactive *model;
  attn_reactive_session *session;
  int wrong = 0;
  check(attn_reactive_create(config, 1, ATTN_F32, &model));
  train(model);
  for (int32_t c = 0; c < COLOURS; ++c) {
    check(attn_reactive_session_create(model, NULL, &session));
    (void)ask(session, FIRST_COLOUR + c);
    wrong += ask(session, WHICH) != FIRST_COLOUR + c;
    attn_reactive_session_destroy(session);
  }
  attn_reactive_destroy(model);
  return wrong > 1;
}
