/* page.html, as it was when the server was built. */
#ifndef ATTN_SERVER_PAGE_H
#define ATTN_SERVER_PAGE_H

#include <stddef.h>

extern const unsigned char attn_page[];
extern const size_t attn_page_size;

#endif
