/* The overview of the command, and its manual page, from the tables of the subcommands. */
#ifndef ATTN_CLI_MANUAL_H
#define ATTN_CLI_MANUAL_H

#include "base/text.h"

/* What `attn help` prints. */
void attn_manual_overview(attn_text *text);
/* man/attn.1 on stdout; the exit code. */
int attn_manual_print(void);

#endif
