/* memory: a library for LD_PRELOAD whose malloc fails now and then.
 *
 * SHORT_OF_MEMORY=FILE: on average one call in as many as the file's first 32-bit word says; 0 = none. It may change at any time.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *p, size_t n);

static atomic_uint *one_in;
static atomic_uint calls;

__attribute__((constructor)) static void look_up(void)
{
    const char *path = getenv("SHORT_OF_MEMORY");
    const int fd = path != NULL ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *word = fd >= 0 ? mmap(NULL, sizeof *one_in, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (word != MAP_FAILED)
        one_in = word;
    if (fd >= 0)
        close(fd);
}

static int fails(void)
{
    const unsigned n = one_in != NULL ? atomic_load(one_in) : 0;
    if (n == 0)
        return 0;
    unsigned x = atomic_fetch_add(&calls, 1) * 2654435761u; /* the same calls in every run */
    x = (x ^ x >> 15) * 2246822519u;
    if ((x ^ x >> 13) % n != 0)
        return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t n)
{
    return fails() ? NULL : __libc_malloc(n);
}

void *calloc(size_t count, size_t size)
{
    return fails() ? NULL : __libc_calloc(count, size);
}

void *realloc(void *p, size_t n)
{
    return fails() ? NULL : __libc_realloc(p, n);
}
