/* machine: what this process may use of the machine.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/machine.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

/* visit(arg, folder) for the folder of this process's cgroup and of each one around it. */
static void each_group(void (*visit)(void *arg, const char *folder), void *arg)
{
    char group[PATH_MAX] = "", folder[PATH_MAX + 32];
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (f != NULL) {
        for (char line[PATH_MAX]; fgets(line, sizeof line, f) != NULL;)
            if (strncmp(line, "0::/", 4) == 0) {
                line[strcspn(line, "\n")] = '\0';
                memcpy(group, line + 3, strlen(line + 3) + 1);
            }
        fclose(f);
    }
    for (char *end;; *end = '\0') {
        snprintf(folder, sizeof folder, "/sys/fs/cgroup%s", group);
        visit(arg, folder);
        if ((end = strrchr(group, '/')) == NULL)
            return;
    }
}

static FILE *open_in(const char *folder, const char *name)
{
    char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return fopen(path, "re");
}

/* "quota period" in microseconds, or "max period". */
static void add_quota(void *arg, const char *folder)
{
    unsigned *least = arg;
    unsigned long long quota, period;
    FILE *f = open_in(folder, "cpu.max");
    if (f == NULL)
        return;
    if (fscanf(f, "%llu %llu", &quota, &period) == 2 && period > 0 && quota / period < *least)
        *least = quota < period ? 1 : (unsigned)(quota / period);
    fclose(f);
}

unsigned pl_machine_quota(void)
{
    unsigned least = UINT_MAX;
    each_group(add_quota, &least);
    return least;
}

/* The number after the first line's beginning that is `what`; UINT64_MAX = there is none. */
static uint64_t read_number(const char *folder, const char *name, const char *what)
{
    char line[256], *end;
    const size_t n = strlen(what);
    uint64_t v = UINT64_MAX;
    FILE *f = open_in(folder, name);
    while (f != NULL && v == UINT64_MAX && fgets(line, sizeof line, f) != NULL)
        if (strncmp(line, what, n) == 0) {
            v = strtoull(line + n, &end, 10);
            v = end == line + n ? UINT64_MAX : v;
        }
    if (f != NULL)
        fclose(f);
    return v;
}

static uint64_t or_0(uint64_t n)
{
    return n == UINT64_MAX ? 0 : n;
}

/* What is left of a cgroup's limit; pages of files can be had back, those too that were read twice, as a model's file is. */
static void add_memory(void *arg, const char *folder)
{
    uint64_t *least = arg;
    const uint64_t max = read_number(folder, "memory.max", ""), used = read_number(folder, "memory.current", "");
    if (max == UINT64_MAX || used == UINT64_MAX) /* no limit */
        return;
    const uint64_t files = or_0(read_number(folder, "memory.stat", "inactive_file ")) + or_0(read_number(folder, "memory.stat", "active_file "));
    const uint64_t held = used > files ? used - files : 0, left = max > held ? max - held : 0;
    *least = left < *least ? left : *least;
}

uint64_t pl_machine_memory(void)
{
    const uint64_t kib = read_number("/proc", "meminfo", "MemAvailable:");
    uint64_t least = kib != UINT64_MAX ? kib * 1024 : (uint64_t)1 << 30;
    struct rlimit limit;
    each_group(add_memory, &least);
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < least)
        least = limit.rlim_cur;
    return least;
}
