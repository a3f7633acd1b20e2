/* What a tokenizer is made of. Text passes through it as
 *
 *   added tokens found -> normalisers -> (normalised) added tokens found -> splits -> model -> ids
 *
 * and between the stages it is a list of pieces over one buffer. */
#ifndef ATTN_FILES_TOKENIZER_PARTS_H
#define ATTN_FILES_TOKENIZER_PARTS_H

#include "files/tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* Hostile files must not make us reserve memory for ids that nobody has; the largest vocabularies
 * have some 300 thousand tokens. */
enum { ATTN_MOST_TOKENS = 1 << 22, ATTN_LONGEST_ADDED = 4096, ATTN_MOST_STEPS = 32 };

/* Grows *items to hold `needed` of `size` bytes each. */
attn_status attn_reserve(void **items, size_t *capacity, size_t needed, size_t size);

/* -- UTF-8 and properties of characters (characters.c) -- */

/* Bytes of the character at `text`, or 0 when they are not valid UTF-8; *code is set when valid. */
int attn_utf8_next(const char *text, size_t size, int32_t *code);
/* Bytes of the maximal invalid part at `text`, where attn_utf8_next gave 0. */
int attn_utf8_invalid(const char *text, size_t size);
void attn_utf8_add(attn_text *text, int32_t code);
bool attn_is_whitespace(int32_t code);  /* White_Space */
bool attn_is_number(int32_t code);      /* Nd, Nl, No */
bool attn_is_word(int32_t code);        /* what a regular expression calls \w */
bool attn_is_punctuation(int32_t code); /* P*, and all of ASCII that is neither letter nor digit */

/* graphemes.c: whether the next character of a text begins a grapheme; starts as {0}. */
typedef struct attn_grapheme {
  bool started;
  int32_t last, breaks; /* the character before, and the state of utf8proc */
  int conjunct;
} attn_grapheme;
bool attn_grapheme_begins(attn_grapheme *grapheme, int32_t code);

/* -- Pieces -- */

typedef struct attn_piece {
  size_t begin, end;
  int32_t token; /* an added token; ATTN_PIECE_TEXT or ATTN_PIECE_BYTES */
  bool first;    /* begins where the whole text begins */
} attn_piece;
enum {
  ATTN_PIECE_TEXT = -1,
  ATTN_PIECE_BYTES = -2 /* not UTF-8: no stage but the mapping of bytes touches it */
};

typedef struct attn_pieces {
  attn_text text;
  attn_piece *items;
  size_t count, capacity;
} attn_pieces;

attn_status attn_pieces_add(attn_pieces *pieces, attn_piece piece);
void attn_pieces_clear(attn_pieces *pieces);
void attn_pieces_free(attn_pieces *pieces);

/* -- Tables (tables.c) -- */

/* Strings by id and ids by string. */
typedef struct attn_vocabulary {
  attn_text text; /* all strings, one after another */
  struct attn_vocabulary_entry {
    size_t at;
    uint32_t size;
    bool present;
    bool outside; /* an added token that the model does not know */
  } * entries;
  size_t count, capacity; /* ids below count */
  int32_t *table;         /* open addressing; -1: empty */
  size_t slots, used;
  uint32_t longest;
} attn_vocabulary;

attn_status attn_vocabulary_add(attn_vocabulary *vocabulary, const char *string, size_t size,
                                int64_t id);
int32_t attn_vocabulary_find(const attn_vocabulary *vocabulary, const char *string, size_t size);
/* The same for models: text must not become an added token just because it spells one. */
int32_t attn_vocabulary_find_inside(const attn_vocabulary *vocabulary, const char *string,
                                    size_t size);
const char *attn_vocabulary_string(const attn_vocabulary *vocabulary, int64_t id, size_t *size);
void attn_vocabulary_free(attn_vocabulary *vocabulary);

/* Which token two neighbours become, and how early. */
typedef struct attn_merge {
  int32_t left, right; /* left -1: an empty slot */
  int32_t result;
  uint32_t rank;
} attn_merge;
typedef struct attn_merges {
  attn_merge *table;
  size_t slots, used;
} attn_merges;

attn_status attn_merges_create(attn_merges *merges, size_t count);
attn_status attn_merges_add(attn_merges *merges, attn_merge merge); /* a later one replaces */
const attn_merge *attn_merges_find(const attn_merges *merges, int32_t left, int32_t right);
void attn_merges_free(attn_merges *merges);

/* Strings sorted, to find those that a text begins with: byte by byte the range of candidates gets
 * narrower. */
typedef struct attn_prefixes {
  attn_text text;
  struct attn_prefix {
    size_t at;
    uint32_t size;
    int32_t id;
  } * items;
  size_t count, capacity;
  uint32_t first[257]; /* where the strings that begin with each byte start */
} attn_prefixes;
typedef struct attn_prefix_walk {
  size_t low, high;
  uint32_t depth;
} attn_prefix_walk;

attn_status attn_prefixes_add(attn_prefixes *set, const char *string, size_t size, int32_t id);
void attn_prefixes_sort(attn_prefixes *set); /* before walks, after the last add */
/* Takes one more byte; a walk starts as {0}. False when no string goes on with it. *id is the
 * string that ends here, or -1. */
bool attn_prefixes_step(const attn_prefixes *set, attn_prefix_walk *walk, unsigned char byte,
                        int32_t *id);
void attn_prefixes_free(attn_prefixes *set);

/* -- Patterns (pattern.c) -- */

typedef enum attn_pattern_kind {
  ATTN_PATTERN_REGEX = 0,
  ATTN_PATTERN_STRING,
  ATTN_PATTERN_CLASS /* each character of a class is a match */
} attn_pattern_kind;

typedef struct attn_pattern {
  attn_pattern_kind kind;
  pcre2_code *regex;
  char *string; /* of a regex: the expression as the file has it */
  size_t size;
  bool (*class)(int32_t code);
} attn_pattern;

/* Of the dialect of tokenizer.json (Oniguruma's), of which what differs is rewritten or refused. */
attn_status attn_pattern_regex(attn_pattern *pattern, const char *expression, size_t size);
attn_status attn_pattern_string(attn_pattern *pattern, const char *string, size_t size);
void attn_pattern_free(attn_pattern *pattern);

/* What matching needs, once for each call of encode. */
typedef struct attn_matcher {
  pcre2_general_context *memory;
  pcre2_match_context *context;
  pcre2_match_data *data;
  uint64_t budget;  /* steps of backtracking left for this text */
  size_t most_text; /* bytes that normalising may make of it */
} attn_matcher;
attn_status attn_matcher_create(attn_matcher *matcher, size_t text_size);
void attn_matcher_free(attn_matcher *matcher);
/* The next match that starts at `from` or later; *found is false when there is none. An empty match
 * is skipped. */
attn_status attn_pattern_next(const attn_pattern *pattern, attn_matcher *matcher, const char *text,
                              size_t size, size_t from, bool *found, size_t *begin, size_t *end);

/* -- Steps of normalising and splitting (steps.c) -- */

typedef enum attn_step_kind {
  ATTN_STEP_UNICODE = 0, /* NFC, NFD, NFKC, NFKD */
  ATTN_STEP_LOWERCASE,
  ATTN_STEP_STRIP_ACCENTS, /* drops Mn, or all marks */
  ATTN_STEP_STRIP,         /* whitespace at the ends */
  ATTN_STEP_PREPEND,       /* `content`, unless the text is empty */
  ATTN_STEP_REPLACE,       /* matches of `pattern` by `content` */
  ATTN_STEP_CHARSMAP,      /* what `content`, SentencePiece's charsmap, makes of it */
  ATTN_STEP_BERT_CLEAN,    /* no control characters; whitespace is a space */
  ATTN_STEP_BERT_CHINESE,  /* spaces around ideographs */
  ATTN_STEP_BYTES,         /* bytes to GPT-2's alphabet */
  ATTN_STEP_SPLIT
} attn_step_kind;

typedef enum attn_behaviour {
  ATTN_SPLIT_REMOVED = 0,
  ATTN_SPLIT_ISOLATED,
  ATTN_SPLIT_MERGED_WITH_PREVIOUS,
  ATTN_SPLIT_MERGED_WITH_NEXT,
  ATTN_SPLIT_CONTIGUOUS
} attn_behaviour;

typedef struct attn_step {
  attn_step_kind kind;
  attn_pattern pattern;
  attn_behaviour behaviour;
  bool invert;          /* the parts between the matches are the matches */
  bool compose, compat; /* UNICODE */
  bool left, right;     /* STRIP */
  bool all_marks;       /* STRIP_ACCENTS */
  bool unless_there;    /* PREPEND: not when the text begins with it */
  bool only_first;      /* PREPEND: only where the whole text begins */
  char *content;
  size_t content_size;
} attn_step;

void attn_step_free(attn_step *step);
/* Appends what a step makes of in's piece `index` to `out`. */
attn_status attn_step_apply(const attn_step *step, attn_matcher *matcher, const attn_pieces *in,
                            size_t index, attn_pieces *out);
/* charsmap.c: makes a zeroed step of a charsmap's bytes, and does what it says until there are more
 * than `most` bytes. */
attn_status attn_charsmap_set(attn_step *step, const char *bytes, size_t size);
attn_status attn_charsmap_apply(const attn_step *step, const char *text, size_t size, size_t most,
                                attn_text *out);
/* Whether it makes spaces of all whitespace, and of U+2581, but for U+0085. */
attn_status attn_charsmap_leaves_spaces(const attn_step *step, bool *leaves);
/* The character of GPT-2's alphabet that stands for a byte, and back (-1: none). */
int32_t attn_byte_character(unsigned char byte);
int attn_character_byte(int32_t code);

/* -- Models (bpe.c, wordpiece.c, unigram.c) -- */

typedef enum attn_model_kind {
  ATTN_BPE = 0,
  ATTN_BPE_SCORES, /* any two neighbours whose union is a token; the best score first */
  ATTN_WORDPIECE,
  ATTN_UNIGRAM
} attn_model_kind;

typedef struct attn_token_model {
  attn_model_kind kind;
  int32_t unknown; /* -1: none */
  bool byte_fallback, fuse_unknown, ignore_merges;
  int32_t byte_ids[256];                 /* of "<0x00>" to "<0xFF>", -1: none */
  char *continuing_prefix, *word_suffix; /* NULL: none */
  size_t continuing_size, suffix_size;
  attn_merges merges;
  uint32_t *ranks;      /* BPE_SCORES: of each id, best 0 */
  int64_t longest_word; /* WORDPIECE: in characters; longer ones are unknown */
  attn_prefixes prefixes;
  double *scores, unknown_score; /* UNIGRAM */
  size_t score_count;            /* ids below it are the model's */
} attn_token_model;

/* Memory that the models use again from piece to piece. */
typedef struct attn_scratch {
  void *symbols, *heap;
  size_t symbol_capacity, heap_capacity, heap_count;
  attn_text text;
} attn_scratch;
void attn_scratch_free(attn_scratch *scratch);

attn_status attn_tokens_add(attn_tokens *tokens, int32_t id);
attn_status attn_bpe_encode(const attn_token_model *model, const attn_vocabulary *vocabulary,
                            attn_scratch *scratch, const char *text, size_t size,
                            attn_tokens *tokens);
attn_status attn_wordpiece_encode(const attn_token_model *model, const attn_vocabulary *vocabulary,
                                  attn_scratch *scratch, const char *text, size_t size,
                                  attn_tokens *tokens);
attn_status attn_unigram_encode(const attn_token_model *model, const attn_vocabulary *vocabulary,
                                attn_scratch *scratch, const char *text, size_t size,
                                attn_tokens *tokens);

/* -- The whole -- */

typedef struct attn_added {
  int32_t id;
  bool special, normalized, left_strip, right_strip, single_word;
  size_t normal_at, normal_size; /* its normalised string in the text of `normal` */
} attn_added;

struct attn_tokenizer {
  attn_vocabulary vocabulary;
  attn_added *added;
  size_t added_count, added_capacity;
  attn_prefixes raw, normal; /* indices of `added`, found before and after normalising */
  attn_step normalisers[ATTN_MOST_STEPS], splits[ATTN_MOST_STEPS];
  int normaliser_count, split_count;
  attn_token_model model;
  bool bytes;                 /* the splits map bytes to GPT-2's alphabet */
  attn_tokens prefix, suffix; /* the ends */
  /* Decoding: how a token's string becomes bytes. */
  struct attn_token_decoder {
    bool byte_level, byte_fallback, wordpiece, cleanup, spaces;
    char *wordpiece_prefix;
    size_t wordpiece_prefix_size;
    struct attn_replacement {
      char *from, *to;
      size_t from_size, to_size;
    } replacements[4];
    int replacement_count;
    size_t strip; /* spaces dropped at the start of a text */
  } decoder;
  attn_text decoded; /* the bytes of every token, one after another */
  size_t *decoded_at;
  unsigned char *special; /* of each id */
};

/* Finishes a tokenizer whose vocabulary, added tokens, steps, model and decoder are set. */
attn_status attn_tokenizer_finish(attn_tokenizer *tokenizer);
attn_status attn_tokenizer_add_token(attn_tokenizer *tokenizer, attn_added added);
attn_status attn_tokenizer_read_json(attn_tokenizer *tokenizer, const char *path);
attn_status attn_tokenizer_read_spec(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec);
/* "left right", both tokens already; the i-th is better than those after it. */
attn_status attn_tokenizer_add_merge(attn_tokenizer *tokenizer, const char *merge, size_t size,
                                     int64_t index);
attn_status attn_tokenizer_add_pair(attn_tokenizer *tokenizer, const char *left, size_t left_size,
                                    const char *right, size_t right_size, int64_t index);
attn_status attn_bert_normalisers(attn_tokenizer *tokenizer, bool clean, bool chinese, bool accents,
                                  bool lower);
attn_status attn_bert_splits(attn_tokenizer *tokenizer);
/* Appends a zeroed step; ATTN_UNSUPPORTED when there are too many. */
attn_status attn_step_new(attn_step *steps, int *count, attn_step **step);
attn_status attn_copy_bytes(const char *bytes, size_t size, char **copy, size_t *copy_size);

/* The i-th way to cut words that tokenizer.ggml.pre can name, or NULL beyond the last; several
 * names may have the same, of which the first is the usual one. */
enum { ATTN_WORD_SPLITS = 6 };
typedef struct attn_word_splitter {
  const char *name;
  const char *splits[ATTN_WORD_SPLITS]; /* one after the other, NULL behind the last */
  bool compose, whole_words;
} attn_word_splitter;
extern const char attn_split_digits[]; /* no expression: each number by itself */
const attn_word_splitter *attn_word_splitter_at(size_t i);
attn_status attn_add_word_splitter(attn_tokenizer *tokenizer, const attn_word_splitter *splitter);
/* The steps of SentencePiece: U+2581 for spaces, and (prefix) before a text. */
attn_status attn_add_line_steps(attn_tokenizer *tokenizer, bool prefix);
/* Those of the model "t5". */
attn_status attn_add_unigram_steps(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec);
enum { ATTN_UNKNOWN_PENALTY = 10 }; /* UNIGRAM: below the lowest score, as SentencePiece has it */

/* describe.c, of which describe_unigram.c and describe_wordpiece.c are the parts that they name. */
bool attn_same_steps(const attn_tokenizer *a, const attn_tokenizer *b);
attn_status attn_tokenizer_probe(attn_tokenizer **tokenizer); /* an empty one, to compare with */
/* Strings and types of all ids; arrays->strings of those that are made in arrays->text are NULL,
 * until attn_arrays_point sets them. */
attn_status attn_arrays_set_tokens(const attn_tokenizer *tokenizer, attn_tokenizer_arrays *arrays);
attn_status attn_arrays_point(attn_tokenizer_arrays *arrays);
attn_status attn_describe_unigram(const attn_tokenizer *tokenizer, attn_tokenizer_arrays *arrays);
attn_status attn_describe_wordpiece(const attn_tokenizer *tokenizer, attn_tokenizer_arrays *arrays);

extern const char attn_lower_line[]; /* U+2581, which stands for a space */

extern const char attn_regex_gpt2[], attn_regex_llama3[], attn_regex_qwen2[], attn_regex_kimi[];
extern const char attn_regex_deepseek_letters[], attn_regex_deepseek_marks[],
    attn_regex_deepseek_east[], attn_regex_deepseek3_east[], attn_regex_deepseek3[];

#endif
