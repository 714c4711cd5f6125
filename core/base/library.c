/* library: finds a library that goes with the program, and loads it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/library.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* folder: seen from the program's; "" = that one itself */
static bool find(char *path, size_t n, const char *folder, const char *name)
{
    const ssize_t len = readlink("/proc/self/exe", path, n - 1);
    if (len <= 0)
        return false;
    path[len] = '\0';
    char *end = strrchr(path, '/') + 1;
    const size_t room = n - (size_t)(end - path);
    return snprintf(end, room, "%s%s", folder, name) < (int)room && access(path, R_OK) == 0;
}

void *pl_library_open(const char *name, const char *file, const char **why)
{
    static const char *const folders[] = {"", "../lib/", "../lib/parley/"};
    char path[PATH_MAX];
    for (size_t i = 0; file == NULL && i < sizeof folders / sizeof folders[0]; i++)
        if (find(path, sizeof path, folders[i], name))
            file = path;
    void *handle = dlopen(file != NULL ? file : name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == NULL && (*why = dlerror()) == NULL)
        *why = name;
    return handle;
}
