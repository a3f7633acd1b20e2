/* attn compare, in parts: options and progress (compare.c), the table and the page
 * (compare_report.c), CAB's index of results from elsewhere (compare_cab.c). The comparison itself
 * is training/compare.h. */
#ifndef ATTN_CLI_COMPARE_H
#define ATTN_CLI_COMPARE_H

#include "base/progress.h"
#include "cli/cli.h"
#include "training/compare.h"

/* "12.3 %", or "-" where it is not known. */
const char *attn_compare_percent(double share, char text[ATTN_FORMAT_SIZE]);

/* What was compared, in a line or two, and a row for each mixer. rows: attn_comparison_rows. */
void attn_compare_print(const attn_comparison *c, const attn_comparison_row *rows);
/* The same as a page with a chart: accuracy against the size of the state. */
attn_status attn_compare_write_html(const attn_comparison *c, const attn_comparison_row *rows,
                                    const char *path);

/* The compositional index of a file of metrics, printed; the exit code. */
int attn_compare_cab(const attn_command *command, const char *path, bool json);

#endif
