/* tokenize: token ids of a text.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "cli/cli.h"
#include "core/base/buf.h"
#include "core/base/mem.h"

int cli_tokenize(int argc, char **argv)
{
    const char *path = NULL, *text = NULL;
    bool special = false;
    const struct cli_flag flags[] = {{"model", &path, NULL}, {"special", NULL, &special}, {NULL, &text, NULL}};
    if (!cli_flags(argc, argv, flags, PL_COUNT_OF(flags)))
        return 2;
    struct pl_gguf *g = NULL;
    struct pl_tok *tok = NULL;
    struct pl_err err = {0};
    struct pl_ids ids = {0};
    struct pl_buf in;
    pl_buf_init(&in, 64 << 20);
    char block[4096];
    size_t n;
    while (text == NULL && (n = fread(block, 1, sizeof block, stdin)) > 0)
        pl_buf_add(&in, block, n);
    if (text != NULL)
        pl_buf_adds(&in, text);
    pl_status st = path != NULL ? pl_gguf_open(&g, path, &err) : pl_fail(&err, PL_EINVAL, "name a GGUF file with --model FILE");
    if (st == PL_OK)
        st = pl_tok_load(&tok, g, &err);
    if (st == PL_OK)
        st = pl_tok_encode(tok, pl_buf_str(&in), in.len, special ? PL_TOK_SPECIAL : 0, 0, &ids, &err);
    for (size_t i = 0; st == PL_OK && i < ids.n; i++)
        printf("%s%d", i > 0 ? " " : "", ids.v[i]);
    if (st == PL_OK)
        putchar('\n');
    else
        fprintf(stderr, "parley: %s\n", err.msg);
    pl_ids_fini(&ids);
    pl_buf_fini(&in);
    pl_tok_free(tok);
    pl_gguf_close(g);
    return st == PL_OK ? 0 : 1;
}
