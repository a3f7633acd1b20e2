#include "cli/cli.h"
static int run(const attn_command *command, void *options, const attn_words *words) {
  (void)command;
  (void)options;
  (void)words;
  return 0;
}
static const bool defaults = false;
const attn_command attn_command_bench = {.name = "bench",
                                         .summary =
                                             "measure the operators of the attention mechanisms",
                                         .usage = "",
                                         .description = "",
                                         .examples = "",
                                         .defaults = &defaults,
                                         .size = 1,
                                         .run = run};
