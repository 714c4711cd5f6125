/* general: a text about this and that.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/general.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/readfile.h"
#include "core/base/utf8.h"

/* The file becomes part of the object; the Makefile knows that it does. */
__asm__(".section .rodata\n"
        "general_text:\n"
        ".incbin \"data/general.txt\"\n"
        "general_text_end:\n"
        ".byte 0\n"
        ".previous\n");
extern const char general_text[], general_text_end[];

pl_status pl_general_read(char **text, size_t *n, const char *path, struct pl_err *err)
{
    void *bytes = NULL;
    if (path != NULL) {
        struct pl_err why = {0};
        const pl_status rc = pl_readfile(&bytes, n, path, PL_GENERAL_MAX, &why);
        if (rc != PL_OK)
            return pl_fail_param(err, rc, "general_text", "%s", why.msg);
        if (!pl_utf8_valid(bytes, *n)) {
            free(bytes);
            return pl_fail_param(err, PL_EFORMAT, "general_text", "%s is not UTF-8 text", path);
        }
        *text = bytes;
        return PL_OK;
    }
    *n = (size_t)(general_text_end - general_text);
    *text = malloc(*n);
    if (*text == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    memcpy(*text, general_text, *n);
    return PL_OK;
}
