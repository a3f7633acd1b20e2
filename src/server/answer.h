/* Answers in the shapes of OpenAI's API. Each function gives a new reference, or NULL when out of
 * memory. */
#ifndef ATTN_SERVER_ANSWER_H
#define ATTN_SERVER_ANSWER_H

#include "server/scheduler.h"

#include <jansson.h>

typedef struct attn_answer {
  bool chat; /* else a completion */
  bool include_usage;
  char id[48];
  int64_t created;
  const char *model;
} attn_answer;

void attn_answer_begin(attn_answer *answer, bool chat, const char *model);
json_t *attn_answer_whole(const attn_answer *answer, const attn_text *text,
                          const attn_job_news *news);
/* Of a stream: the first one of a chat, which says who speaks; a piece of text; the last one, which
 * says why the text ended; and the one after it with the counts. */
json_t *attn_answer_role(const attn_answer *answer);
json_t *attn_answer_piece(const attn_answer *answer, const attn_text *text);
json_t *attn_answer_last(const attn_answer *answer, const attn_job_news *news);
json_t *attn_answer_usage(const attn_answer *answer, const attn_job_news *news);

/* 64 bits from the system. */
uint64_t attn_random_bits(void);

#endif
