/* scratch: a folder for one test, and files to compare.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/scratch.h"

#include <check.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/mem.h"

char scratch_folder[64];

void scratch_make(void)
{
    strcpy(scratch_folder, "/tmp/parley-check-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(scratch_folder));
}

const char *scratch_path(const char *name)
{
    static char paths[4][400];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", scratch_folder, name);
    return path;
}

int scratch_files(void)
{
    DIR *d = opendir(scratch_folder);
    int n = -2; /* . and .. */
    while (readdir(d) != NULL)
        n++;
    closedir(d);
    return n;
}

void scratch_remove(void)
{
    DIR *d = opendir(scratch_folder);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        unlink(scratch_path(e->d_name));
    closedir(d);
    ck_assert_int_eq(rmdir(scratch_folder), 0);
}

uint8_t *scratch_read(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    ck_assert_msg(f != NULL, "%s (run in the repository's root)", path);
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    uint8_t *bytes = pl_xmalloc(*n + 1);
    ck_assert_uint_eq(fread(bytes, 1, *n, f), *n);
    fclose(f);
    return bytes;
}

void scratch_same(const char *a, const char *b)
{
    size_t n, m;
    uint8_t *x = scratch_read(a, &n), *y = scratch_read(b, &m);
    ck_assert_msg(n == m && memcmp(x, y, n) == 0, "%s and %s differ", a, b);
    free(x), free(y);
}
