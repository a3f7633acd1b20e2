/* Command lines: one table an option list, from which parsing, --help and the manual follow.
 *
 * An option names a field of the command's option struct by its offset; the struct's initial
 * values are the defaults, and what --help shows as such. A number below `least` is none: what
 * happens without the option depends on something else, which its help says. */
#ifndef ATTN_CLI_OPTIONS_H
#define ATTN_CLI_OPTIONS_H

#include "attn/tensor.h"
#include "base/text.h"

#include <stddef.h>

enum { ATTN_MOST_WORDS = 256 };

/* Words of a command line, in its order; they live as long as argv. */
typedef struct attn_words {
  const char *items[ATTN_MOST_WORDS];
  int count;
} attn_words;

enum { ATTN_MOST_NUMBERS = 64 };

typedef struct attn_numbers {
  int64_t items[ATTN_MOST_NUMBERS];
  int count;
} attn_numbers;

typedef struct attn_reals {
  double items[ATTN_MOST_NUMBERS];
  int count;
} attn_reals;

/* The field is of the type in brackets. */
typedef enum attn_option_kind {
  ATTN_OPTION_FLAG = 0, /* [bool] becomes true */
  ATTN_OPTION_INT,      /* [int64_t] 12, 4K, 1M: K is 1024 */
  ATTN_OPTION_SEED,     /* [uint64_t] */
  ATTN_OPTION_REAL,     /* [double] */
  ATTN_OPTION_TEXT,     /* [const char *] */
  ATTN_OPTION_DTYPE,    /* [attn_dtype] one of `choices` */
  ATTN_OPTION_CHOICE,   /* [int] index into `choices` */
  ATTN_OPTION_NAME,     /* [const char *] one of `choices`, or NULL without the option */
  ATTN_OPTION_WORDS,    /* [attn_words] all words up to the next option; may be repeated */
  ATTN_OPTION_LIST,     /* [attn_words] names with commas between them: a,b */
  ATTN_OPTION_NUMBERS,  /* [attn_numbers] with commas: 1K,4K */
  ATTN_OPTION_REALS,    /* [attn_reals] with commas: 1e-3,0.01 */
} attn_option_kind;

typedef struct attn_option {
  const char *name; /* without the dashes */
  char letter;      /* -n; 0: none */
  attn_option_kind kind;
  const char *argument; /* what stands for the value in --help */
  const char *help;     /* one sentence; NULL hides the option */
  size_t offset;
  double least, most;         /* of numbers, closed */
  const char *const *choices; /* ends with NULL */
} attn_option;

typedef struct attn_command attn_command;
struct attn_command {
  const char *name;
  const char *summary;     /* one line, for the list of commands */
  const char *usage;       /* the words after the options, e.g. "[MODEL]" */
  const char *description; /* paragraphs, separated by empty lines; wrapped when printed */
  const char *examples;    /* lines "command\twhat it does" */
  const attn_option *options;
  int option_count;
  const void *defaults; /* the option struct */
  size_t size;
  int least_words, most_words;
  int (*run)(const attn_command *command, void *options, const attn_words *words);
};

typedef enum attn_parsed { ATTN_PARSED = 0, ATTN_PARSED_HELP, ATTN_PARSED_WRONG } attn_parsed;

/* Fills `options` (command->size bytes) from the defaults and argv[0 .. count - 1], which are the
 * words after the command's name. ATTN_PARSED_WRONG: *message (to be freed by attn_free; NULL when
 * out of memory) says what is wrong. LIST items are cut out of argv in place. */
attn_parsed attn_options_parse(const attn_command *command, int count, char **argv, void *options,
                               attn_words *words, char **message);

/* The text of `attn NAME --help`, 80 columns. */
void attn_options_help(const attn_command *command, attn_text *text);
/* "(default)" of an option, or "" when the default is nothing to speak of. */
void attn_option_default(const attn_command *command, const attn_option *option, char *text,
                         size_t size);
/* Appends `paragraphs` in lines of at most 80 columns that begin with `indent` spaces; the first
 * line goes on at column `column`. */
void attn_text_wrap(attn_text *text, const char *paragraphs, int indent, int column);

#endif
