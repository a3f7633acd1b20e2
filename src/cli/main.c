/* attn: the command. Finds the subcommand, parses its options and runs it. */
#include "cli/cli.h"
#include "cli/manual.h"
#include "base/memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

extern const attn_command attn_command_run, attn_command_serve, attn_command_train,
    attn_command_eval, attn_command_compare, attn_command_embed, attn_command_bench,
    attn_command_list, attn_command_info, attn_command_convert, attn_command_help;

const attn_command *const attn_commands[] = {
    &attn_command_run,     &attn_command_serve,   &attn_command_train, &attn_command_eval,
    &attn_command_compare, &attn_command_embed,   &attn_command_bench, &attn_command_list,
    &attn_command_info,    &attn_command_convert, &attn_command_help,
};
const int attn_command_count = ATTN_COUNT(attn_commands);

static const attn_command *find_command(const char *name) {
  for (int i = 0; i < attn_command_count; ++i)
    if (strcmp(attn_commands[i]->name, name) == 0) return attn_commands[i];
  return NULL;
}

static const char *command_name(const void *context, int64_t i) {
  (void)context;
  return attn_commands[i]->name;
}

/* What was printed may still fail to arrive: a full disk. */
static int finish(const attn_command *command, int code) {
  if (fflush(stdout) == 0 && !ferror(stdout)) return code;
  attn_complain(command, "cannot write to standard output: %s", strerror(errno));
  return code == ATTN_EXIT_OK ? ATTN_EXIT_FAILURE : code;
}

static int print_help(const attn_command *command) {
  attn_text text = {0};
  char *result;
  attn_options_help(command, &text);
  attn_status status = attn_text_take(&text, &result);
  if (status != ATTN_OK) return attn_report(command, status);
  fputs(result, stdout);
  attn_free(result);
  return ATTN_EXIT_OK;
}

static int run_command(const attn_command *command, int count, char **argv) {
  void *options = attn_alloc_zero(command->size);
  attn_words words;
  char *message;
  int code;
  if (!options) return attn_report(command, ATTN_OUT_OF_MEMORY);
  switch (attn_options_parse(command, count, argv, options, &words, &message)) {
  case ATTN_PARSED_HELP: code = print_help(command); break;
  case ATTN_PARSED_WRONG: code = attn_misuse(command, "%s", message ? message : "no memory"); break;
  default: code = command->run(command, options, &words); break;
  }
  attn_free(message);
  attn_free(options);
  return finish(command, code);
}

static int print_overview(FILE *file) {
  attn_text text = {0};
  char *result;
  attn_manual_overview(&text);
  attn_status status = attn_text_take(&text, &result);
  if (status != ATTN_OK) return attn_report(NULL, status);
  fputs(result, file);
  attn_free(result);
  return ATTN_EXIT_OK;
}

static int run_help(const attn_command *command, void *options, const attn_words *words) {
  const bool *roff = options;
  if (*roff) return attn_manual_print();
  if (!words->count) return print_overview(stdout);
  const attn_command *about = find_command(words->items[0]);
  char hint[ATTN_HINT_SIZE];
  if (about) return print_help(about);
  return attn_misuse(
      NULL, "there is no command '%s'%s", words->items[0],
      attn_close_names(words->items[0], command_name, command, attn_command_count, hint));
}

static const bool help_defaults = false;
static const attn_option help_options[] = {
    {.name = "roff", .kind = ATTN_OPTION_FLAG}, /* writes man/attn.1; see `make docs` */
};

const attn_command attn_command_help = {
    .name = "help",
    .summary = "explain a command",
    .usage = "[COMMAND]",
    .description = "Explains a command, or lists them all.",
    .examples = "attn help run\twhat `attn run --help` prints too",
    .options = help_options,
    .option_count = ATTN_COUNT(help_options),
    .defaults = &help_defaults,
    .size = sizeof help_defaults,
    .most_words = 1,
    .run = run_help,
};

int main(int argc, char **argv) {
  if (argc < 2) {
    print_overview(stderr);
    return ATTN_EXIT_USAGE;
  }
  const char *word = argv[1];
  if (strcmp(word, "--version") == 0) {
    printf("attn %s\n", attn_version());
    return finish(NULL, ATTN_EXIT_OK);
  }
  if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0)
    return finish(NULL, print_overview(stdout));
  const attn_command *command = find_command(word);
  if (command) return run_command(command, argc - 2, argv + 2);
  char hint[ATTN_HINT_SIZE];
  return attn_misuse(NULL, "there is no command '%s'%s", word,
                     attn_close_names(word, command_name, NULL, attn_command_count, hint));
}
