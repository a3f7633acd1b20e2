/* The decode state of a mixer: a value with checkpoints.
 *
 * A mixer describes its state as a list of parts; everything else (sizes, growing, forking,
 * cutting, checkpoints, saving) is done here once for all mixers. A part is
 *
 *   - fixed: a tensor that each step overwrites, a d x d matrix or a convolution's tail; or
 *   - rows: one row a token, in pages, keys and values. Pages are shared, with reference counts,
 *     between forks and checkpoints, and copied when a sharer writes to them. */
#ifndef ATTN_MIXERS_STATE_H
#define ATTN_MIXERS_STATE_H

#include "attn/tensor.h"

enum { ATTN_STATE_PARTS = 8, ATTN_PAGE_TOKENS = 64 };

typedef enum attn_state_kind { ATTN_STATE_FIXED = 0, ATTN_STATE_ROWS } attn_state_kind;

typedef struct attn_state_part {
  const char *name;
  attn_state_kind kind;
  attn_dtype dtype;
  int rank;
  int64_t shape[4]; /* fixed: of the whole; rows: rank 1, the width of a token's row */
  int64_t block;    /* fixed: [block, width], the rows of one block of tokens: that of token t is
                     * row t % block; 0: something else */
  int64_t window;   /* rows: only the last `window` rows are ever read; 0: all of them */
} attn_state_part;

/* Pages for the rows of one part, shared by a session and its forks, in memory of a device.
 * Thread-safe, without locks. */
typedef struct attn_page_pool attn_page_pool;
attn_status attn_page_pool_create(attn_device device, const attn_state_part *part, int64_t pages,
                                  attn_page_pool **pool);
void attn_page_pool_retain(attn_page_pool *pool);
void attn_page_pool_release(attn_page_pool *pool); /* frees it with the last user */

typedef struct attn_state attn_state;

/* An empty state whose rows are at most `capacity` tokens (1 to ATTN_STATE_CAPACITY); fixed parts
 * hold any number. With `family`, a state of the same parts, pages come from its pools (a fork);
 * else new pools on `device` hold `sharers` times
 * the capacity. Names of parts are borrowed. */
enum { ATTN_STATE_CAPACITY = INT32_MAX - ATTN_PAGE_TOKENS }; /* the engines' lengths are int32 */
attn_status attn_state_create(attn_device device, const attn_state_part *parts, int count,
                              int64_t capacity, int64_t sharers, const attn_state *family,
                              attn_state **state);
void attn_state_destroy(attn_state *state);

int64_t attn_state_position(const attn_state *state); /* tokens seen */
/* After a mixer has taken `tokens` more: moves the position; pages out of every window are freed.
 */
void attn_state_advance(attn_state *state, int64_t tokens);

/* A fixed part, to be read and written in place. */
attn_tensor attn_state_fixed(const attn_state *state, int part);

/* Writes n rows behind the rows so far, into their columns from `column` on: rows is [n, columns]
 * of the part's dtype. They count once attn_state_advance is called. ATTN_OUT_OF_MEMORY when the
 * capacity or the pool is used up; the state is then as it was, and so are its pages. */
attn_status attn_state_append(attn_state *state, int part, int64_t column, const attn_tensor *rows);
/* Makes room for one more token in every part and puts the tables where the engines read them:
 * attn_state_append then moves nothing. Afterwards the numbers below are that token's, in memory
 * that lasts as long as the state: its position, the tokens with it, its row among a part's pages.
 */
attn_status attn_state_prepare(attn_state *state);
const int64_t *attn_state_position_place(const attn_state *state);
const int32_t *attn_state_next_length(const attn_state *state);
const int64_t *attn_state_next_row(const attn_state *state, int part);
/* Of a part with a block: the rows in use with that token's. */
const int32_t *attn_state_next_block_length(const attn_state *state, int part);
/* All pages [pages, ATTN_PAGE_TOKENS, width] and this state's table [1, pages a sequence], int32,
 * both on the state's device. */
attn_tensor attn_state_pages(const attn_state *state, int part);
attn_tensor attn_state_page_table(const attn_state *state, int part);

/* Copies the first `count` rows, those behind the position included, one after the other to
 * `rows`, memory of the state's device. */
attn_status attn_state_copy_rows(const attn_state *state, int part, int64_t count, void *rows);

/* target := source; both made from the same parts, target with source's pools and with capacity
 * for source's tokens. Copies fixed parts, shares pages. Used for forks and checkpoints. Allocates
 * nothing. */
void attn_state_assign(attn_state *target, const attn_state *source);
/* Whether `b` takes its pages from the pools of `a`. */
bool attn_state_is_related(const attn_state *a, const attn_state *b);
/* Back to no tokens. */
void attn_state_clear(attn_state *state);
/* Cuts to the first `position` tokens if the state allows it: no fixed parts, and every row that
 * the last window needs is still there. */
bool attn_state_cut(attn_state *state, int64_t position);

/* The whole state as bytes, for files: calls write(context, data, size) piece by piece; and back.
 * Both stop at the first error and return it; restore then leaves an empty state. */
typedef attn_status (*attn_state_write)(void *context, const void *data, size_t size);
typedef attn_status (*attn_state_read)(void *context, void *data, size_t size);
attn_status attn_state_save(const attn_state *state, attn_state_write write, void *context);
attn_status attn_state_restore(attn_state *state, attn_state_read read, void *context);

/* Bytes in use now: fixed parts and pages that hold this state's tokens. */
int64_t attn_state_bytes(const attn_state *state);

#endif
