/* encode: a model file's tokenizer as a filter, for the tokenizer oracle. Reads texts as (u32 length, bytes); prints the ids
 * of each on a line, then, after "|", the ids decoded again as hex bytes. --plain: special tokens in the texts are
 * ordinary text.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/model/gguf.h"
#include "core/text/tok.h"

static pl_status one(const struct pl_tok *tok, const char *s, size_t n, unsigned flags, struct pl_err *err)
{
    struct pl_ids ids = {0};
    struct pl_buf text;
    pl_buf_init(&text, 0);
    pl_status st = pl_tok_encode(tok, s, n, flags, 0, &ids, err);
    for (size_t i = 0; st == PL_OK && i < ids.n; i++)
        printf("%d ", ids.v[i]);
    putchar('|');
    pl_tok_decode(tok, ids.v, ids.n, true, &text);
    for (size_t i = 0; i < text.len; i++)
        printf("%02x", (unsigned char)text.data[i]);
    putchar('\n');
    pl_buf_fini(&text);
    pl_ids_fini(&ids);
    return st;
}

int main(int argc, char **argv)
{
    struct pl_err err = {0};
    struct pl_gguf *g = NULL;
    struct pl_tok *tok = NULL;
    uint32_t n;
    unsigned flags = argc == 3 && strcmp(argv[2], "--plain") == 0 ? 0 : PL_TOK_SPECIAL;
    pl_status st = argc >= 2 ? pl_gguf_open(&g, argv[1], &err) : pl_fail(&err, PL_EINVAL, "usage: encode FILE [--plain] <TEXTS");
    if (st == PL_OK)
        st = pl_tok_load(&tok, g, &err);
    while (st == PL_OK && fread(&n, sizeof n, 1, stdin) == 1) {
        char *s = malloc((size_t)n + 1);
        st = s != NULL && fread(s, 1, n, stdin) == n ? one(tok, s, n, flags, &err) : pl_fail(&err, PL_EIO, "the input is cut short");
        free(s);
    }
    if (st != PL_OK)
        fprintf(stderr, "encode: %s\n", err.msg);
    pl_tok_free(tok);
    pl_gguf_close(g);
    return st == PL_OK ? 0 : 1;
}
