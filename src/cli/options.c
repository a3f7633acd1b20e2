#include "cli/options.h"
#include "base/memory.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COLUMNS = 80, HELP_COLUMN = 29 };

/* What all commands understand besides their own. */
static const char *const help_names[] = {"--help", "-h"};

static bool is_help(const char *word) {
  return strcmp(word, help_names[0]) == 0 || strcmp(word, help_names[1]) == 0;
}

/* Values ----------------------------------------------------------------------------------------
 */

/* 12, 4K, 2M, 1G. */
static bool parse_int(const char *text, int64_t *value) {
  char *end;
  errno = 0;
  long long number = strtoll(text, &end, 10);
  if (end == text || errno) return false;
  int shift = *end == 'K' || *end == 'k'   ? 10
              : *end == 'M' || *end == 'm' ? 20
              : *end == 'G' || *end == 'g' ? 30
                                           : 0;
  if (shift) ++end;
  if (*end || number > INT64_MAX >> shift || number < INT64_MIN >> shift) return false;
  *value = number * ((int64_t)1 << shift);
  return true;
}

static bool parse_seed(const char *text, uint64_t *value) {
  char *end;
  errno = 0;
  if (*text < '0' || *text > '9') return false;
  *value = strtoull(text, &end, 10);
  return end != text && !*end && !errno && *value <= INT64_MAX; /* what JSON can say */
}

static bool parse_real(const char *text, double *value) {
  char *end;
  *value = strtod(text, &end);
  return end != text && !*end && isfinite(*value);
}

typedef struct value_context {
  const attn_option *option;
  const char *text;
  attn_text *message;
} value_context;

static bool wrong(const value_context *c, const char *expected) {
  attn_text_print(c->message, "--%s is '%s', expected %s", c->option->name, c->text, expected);
  return false;
}

static bool out_of_range(const value_context *c) {
  const attn_option *o = c->option;
  attn_text_print(c->message, "--%s is %s, expected ", o->name, c->text);
  if (o->most >= 1e15)
    attn_text_print(c->message, "at least %.15g", o->least);
  else
    attn_text_print(c->message, "%.15g to %.15g", o->least, o->most);
  return false;
}

static bool in_range(const attn_option *option, double value) {
  return value >= option->least && value <= option->most;
}

static const char *choice_name(const void *context, int64_t i) {
  return ((const char *const *)context)[i];
}

static int count_choices(const char *const *choices) {
  int count = 0;
  while (choices[count]) ++count;
  return count;
}

static void list_choices(const char *const *choices, attn_text *text) {
  int count = count_choices(choices);
  for (int i = 0; i < count; ++i)
    attn_text_print(text, "%s%s", i == 0 ? "" : i + 1 < count ? ", " : " or ", choices[i]);
}

static int find_choice(const value_context *c) {
  const char *const *choices = c->option->choices;
  char hint[ATTN_HINT_SIZE];
  int count = count_choices(choices);
  for (int i = 0; i < count; ++i)
    if (strcmp(choices[i], c->text) == 0) return i;
  attn_text_print(c->message, "--%s is '%s', expected ", c->option->name, c->text);
  list_choices(choices, c->message);
  attn_text_print(c->message, "%s", attn_close_names(c->text, choice_name, choices, count, hint));
  return -1;
}

static bool add_word(const value_context *c, attn_words *words, const char *word) {
  if (words->count == ATTN_MOST_WORDS) {
    attn_text_print(c->message, "--%s: more than %d values", c->option->name, ATTN_MOST_WORDS);
    return false;
  }
  words->items[words->count++] = word;
  return true;
}

/* Cuts `text` at its commas. A list given replaces the default one. */
static bool parse_list(const value_context *c, char *text, attn_words *words) {
  words->count = 0;
  for (char *item = text, *comma; item; item = comma) {
    comma = strchr(item, ',');
    if (comma) *comma++ = '\0';
    if (!*item) return wrong(c, "names with commas between them");
    if (!add_word(c, words, item)) return false;
  }
  return true;
}

enum { NUMBER_SIZE = 32 };

/* The next of several numbers; *rest then stands behind its comma, or is NULL at the end. */
static bool next_number(const value_context *c, const char **rest, int count,
                        char one[NUMBER_SIZE]) {
  size_t size = strcspn(*rest, ",");
  if (size >= NUMBER_SIZE) return wrong(c, "numbers with commas between them");
  if (count == ATTN_MOST_NUMBERS) return wrong(c, "at most 64 numbers");
  memcpy(one, *rest, size);
  one[size] = '\0';
  *rest = (*rest)[size] ? *rest + size + 1 : NULL;
  return true;
}

static bool parse_numbers(const value_context *c, attn_numbers *numbers) {
  char one[NUMBER_SIZE];
  numbers->count = 0;
  for (const char *rest = c->text; rest;) {
    int64_t value;
    if (!next_number(c, &rest, numbers->count, one)) return false;
    if (!parse_int(one, &value)) return wrong(c, "numbers with commas between them, e.g. 1K,4K");
    if (!in_range(c->option, (double)value)) return out_of_range(c);
    numbers->items[numbers->count++] = value;
  }
  return true;
}

static bool parse_reals(const value_context *c, attn_reals *reals) {
  char one[NUMBER_SIZE];
  reals->count = 0;
  for (const char *rest = c->text; rest;) {
    double value;
    if (!next_number(c, &rest, reals->count, one)) return false;
    if (!parse_real(one, &value))
      return wrong(c, "numbers with commas between them, e.g. 0.001,0.01");
    if (!in_range(c->option, value)) return out_of_range(c);
    reals->items[reals->count++] = value;
  }
  return true;
}

static bool parse_value(const value_context *c, char *text, void *field) {
  const attn_option *o = c->option;
  switch (o->kind) {
  case ATTN_OPTION_INT:
    if (!parse_int(text, field)) return wrong(c, "an integer");
    return in_range(o, (double)*(int64_t *)field) || out_of_range(c);
  case ATTN_OPTION_SEED:
    return parse_seed(text, field) || wrong(c, "an integer from 0 to 2^63 - 1");
  case ATTN_OPTION_REAL:
    if (!parse_real(text, field)) return wrong(c, "a number");
    return in_range(o, *(double *)field) || out_of_range(c);
  case ATTN_OPTION_DTYPE: return find_choice(c) >= 0 && attn_dtype_parse(text, field) == ATTN_OK;
  case ATTN_OPTION_CHOICE: return (*(int *)field = find_choice(c)) >= 0;
  case ATTN_OPTION_NAME: *(const char **)field = text; return find_choice(c) >= 0;
  case ATTN_OPTION_WORDS: return add_word(c, field, text);
  case ATTN_OPTION_LIST: return parse_list(c, text, field);
  case ATTN_OPTION_NUMBERS: return parse_numbers(c, field);
  case ATTN_OPTION_REALS: return parse_reals(c, field);
  default: *(const char **)field = text; return true;
  }
}

/* Words -----------------------------------------------------------------------------------------
 */

typedef struct parser {
  const attn_command *command;
  char **argv;
  int count, next;
  char *options;
  attn_words *words;
  attn_text message;
} parser;

static const attn_option *find_option(const attn_command *command, const char *word, size_t size) {
  for (int i = 0; i < command->option_count; ++i) {
    const attn_option *o = &command->options[i];
    bool is_long =
        word[1] == '-' && strlen(o->name) == size - 2 && memcmp(o->name, word + 2, size - 2) == 0;
    if (is_long || (o->letter && size == 2 && word[1] == o->letter)) return o;
  }
  return NULL;
}

static const char *option_name(const void *context, int64_t i) {
  const attn_command *command = context;
  return i < command->option_count ? command->options[i].name : "help";
}

static bool unknown_option(parser *p, const char *word, size_t size) {
  char name[64], hint[ATTN_HINT_SIZE];
  snprintf(name, sizeof name, "%.*s", (int)(size > 2 ? size - 2 : 0), word + 2);
  attn_text_print(
      &p->message, "unknown option %.*s%s", (int)size, word,
      attn_close_names(name, option_name, p->command, p->command->option_count + 1, hint));
  return false;
}

static bool parse_option(parser *p, char *word) {
  char *equals = word[1] == '-' ? strchr(word, '=') : NULL;
  size_t size = equals ? (size_t)(equals - word) : strlen(word);
  const attn_option *o = find_option(p->command, word, size);
  if (!o) return unknown_option(p, word, size);
  void *field = p->options + o->offset;
  if (o->kind == ATTN_OPTION_FLAG) {
    *(bool *)field = true;
    if (equals) attn_text_print(&p->message, "--%s takes no value", o->name);
    return !equals;
  }
  char *value = equals ? equals + 1 : p->next < p->count ? p->argv[p->next++] : NULL;
  if (!value) {
    attn_text_print(&p->message, "--%s needs a value: --%s %s", o->name, o->name, o->argument);
    return false;
  }
  value_context context = {o, value, &p->message};
  if (!parse_value(&context, value, field)) return false;
  while (o->kind == ATTN_OPTION_WORDS && !equals && p->next < p->count &&
         p->argv[p->next][0] != '-')
    if (!add_word(&context, field, p->argv[p->next++])) return false;
  return true;
}

static bool count_words(parser *p) {
  const attn_command *c = p->command;
  if (p->words->count > c->most_words)
    attn_text_print(&p->message, "unexpected word '%s'", p->words->items[c->most_words]);
  else if (p->words->count < c->least_words)
    attn_text_print(&p->message, "expected %s", c->usage);
  else
    return true;
  return false;
}

static bool parse(parser *p, bool *help) {
  bool only_words = false;
  while (p->next < p->count) {
    char *word = p->argv[p->next++];
    if (!only_words && is_help(word)) {
      *help = true;
      return true;
    }
    if (!only_words && strcmp(word, "--") == 0) {
      only_words = true;
    } else if (!only_words && word[0] == '-' && word[1]) {
      if (!parse_option(p, word)) return false;
    } else if (p->words->count == ATTN_MOST_WORDS) {
      attn_text_print(&p->message, "more than %d words", ATTN_MOST_WORDS);
      return false;
    } else {
      p->words->items[p->words->count++] = word;
    }
  }
  return count_words(p);
}

attn_parsed attn_options_parse(const attn_command *command, int count, char **argv, void *options,
                               attn_words *words, char **message) {
  parser p = {.command = command, .argv = argv, .count = count, .options = options, .words = words};
  bool help = false;
  *message = NULL;
  words->count = 0;
  if (command->size) memcpy(options, command->defaults, command->size);
  bool right = parse(&p, &help);
  if (!right) attn_text_take(&p.message, message);
  attn_text_free(&p.message);
  return help ? ATTN_PARSED_HELP : right ? ATTN_PARSED : ATTN_PARSED_WRONG;
}

/* Help ------------------------------------------------------------------------------------------
 */

void attn_text_wrap(attn_text *text, const char *paragraphs, int indent, int column) {
  bool fresh = true; /* nothing after the indentation yet */
  if (column < indent)
    column += (attn_text_print(text, "%*s", indent - column, ""), indent - column);
  for (const char *word = paragraphs; *word;) {
    if (*word == '\n') { /* an empty line between paragraphs */
      attn_text_print(text, "\n%s%*s", word[1] == '\n' ? "\n" : "", indent, "");
      word += word[1] == '\n' ? 2 : 1;
      column = indent;
      fresh = true;
      continue;
    }
    if (*word == ' ') {
      ++word;
      continue;
    }
    int size = (int)strcspn(word, " \n");
    if (!fresh && column + 1 + size > COLUMNS) {
      attn_text_print(text, "\n%*s", indent, "");
      column = indent;
      fresh = true;
    }
    attn_text_print(text, "%s%.*s", fresh ? "" : " ", size, word);
    column += size + !fresh;
    fresh = false;
    word += size;
  }
  attn_text_print(text, "\n");
}

static void print_number(char *text, size_t size, int64_t value) {
  bool round = value && value % 1024 == 0;
  snprintf(text, size, round ? "%lldK" : "%lld", (long long)(round ? value / 1024 : value));
}

void attn_option_default(const attn_command *command, const attn_option *option, char *text,
                         size_t size) {
  const void *field = (const char *)command->defaults + option->offset;
  text[0] = '\0';
  switch (option->kind) {
  case ATTN_OPTION_INT:
    if ((double)*(const int64_t *)field >= option->least)
      print_number(text, size, *(const int64_t *)field);
    break;
  case ATTN_OPTION_SEED:
    snprintf(text, size, "%llu", (unsigned long long)*(const uint64_t *)field);
    break;
  case ATTN_OPTION_REAL:
    if (*(const double *)field >= option->least)
      snprintf(text, size, "%.6g", *(const double *)field);
    break;
  case ATTN_OPTION_DTYPE:
    snprintf(text, size, "%s", attn_dtype_name(*(const attn_dtype *)field));
    break;
  case ATTN_OPTION_CHOICE: snprintf(text, size, "%s", option->choices[*(const int *)field]); break;
  case ATTN_OPTION_TEXT:
  case ATTN_OPTION_NAME:
    if (*(const char *const *)field) snprintf(text, size, "%s", *(const char *const *)field);
    break;
  case ATTN_OPTION_LIST:
    for (int i = 0; i < ((const attn_words *)field)->count; ++i) {
      size_t used = strlen(text);
      snprintf(text + used, size - used, "%s%s", i ? "," : "",
               ((const attn_words *)field)->items[i]);
    }
    break;
  case ATTN_OPTION_NUMBERS:
    for (int i = 0; i < ((const attn_numbers *)field)->count; ++i) {
      size_t used = strlen(text);
      if (i && used + 1 < size) text[used++] = ',';
      print_number(text + used, size - used, ((const attn_numbers *)field)->items[i]);
    }
    break;
  case ATTN_OPTION_REALS:
    for (int i = 0; i < ((const attn_reals *)field)->count; ++i) {
      size_t used = strlen(text);
      snprintf(text + used, size - used, "%s%.6g", i ? "," : "",
               ((const attn_reals *)field)->items[i]);
    }
    break;
  default: break;
  }
}

static void option_help(const attn_command *command, const attn_option *o, attn_text *text) {
  char start[64], value[128];
  attn_text help = {0};
  if (o->letter)
    snprintf(start, sizeof start, "  -%c, --%s %s", o->letter, o->name,
             o->argument ? o->argument : "");
  else
    snprintf(start, sizeof start, "      --%s %s", o->name, o->argument ? o->argument : "");
  int column = (int)strlen(start);
  attn_text_print(text, "%s", start);
  if (column + 1 > HELP_COLUMN) {
    attn_text_print(text, "\n");
    column = 0;
  }
  attn_text_print(&help, "%s", o->help);
  if (o->choices) {
    attn_text_print(&help, ": ");
    list_choices(o->choices, &help);
  }
  attn_option_default(command, o, value, sizeof value);
  if (value[0]) attn_text_print(&help, " (%s)", value);
  attn_text_wrap(text, help.failed ? o->help : help.data, HELP_COLUMN, column);
  attn_text_free(&help);
}

static void print_examples(const char *examples, attn_text *text) {
  for (const char *line = examples; *line;) {
    size_t size = strcspn(line, "\n"), command = strcspn(line, "\t");
    attn_text_print(text, "  %.*s\n", (int)command, line);
    if (command < size)
      attn_text_print(text, "      %.*s\n", (int)(size - command - 1), line + command + 1);
    line += size + (line[size] == '\n');
  }
}

void attn_options_help(const attn_command *command, attn_text *text) {
  attn_text_print(text, "usage: attn %s %s%s%s\n\n", command->name,
                  command->option_count ? "[OPTIONS]" : "", command->usage[0] ? " " : "",
                  command->usage);
  attn_text_wrap(text, command->description, 0, 0);
  attn_text_print(text, "\noptions:\n");
  for (int i = 0; i < command->option_count; ++i)
    if (command->options[i].help) option_help(command, &command->options[i], text);
  attn_text_print(text, "  -h, --help%*sThis text.\n\nexamples:\n", HELP_COLUMN - 12, "");
  print_examples(command->examples, text);
}
