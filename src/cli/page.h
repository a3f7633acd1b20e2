/* Reports as pages: self-contained HTML that follows the reader's light or dark theme. */
#ifndef ATTN_CLI_PAGE_H
#define ATTN_CLI_PAGE_H

#include "base/text.h"

/* Up to and including the title as a heading. */
void attn_page_begin(attn_text *out, const char *title);
/* Text of anyone's, made safe between tags and in attributes. */
void attn_page_text(attn_text *out, const char *text);
void attn_page_end(attn_text *out);
/* Hands the page over to a file, whose directory is made if needed; `out` is empty afterwards. */
attn_status attn_page_write(attn_text *out, const char *path);

#endif
