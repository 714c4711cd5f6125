/* job: job.json, the file in which the daemon tells a worker what to do.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/job.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/json.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/base/readfile.h"

enum { MAX_JOB = 1 << 20 };

static const struct {
    const char *name;
    size_t offset;
    bool required;
} texts[] = {
#define AT(field) offsetof(struct pl_train_job, field)
    {"id", AT(id), true},
    {"name", AT(name), true},
    {"base", AT(base), true}, /* but for a model from nothing */
    {"base_id", AT(base_id), false},
    {"base_adapter", AT(base_adapter), false},
    {"chat_template", AT(chat_template), false},
    {"general_text", AT(general_text), false},
    {"training_file", AT(training_file), true},
    {"validation_file", AT(validation_file), false},
};

static char **text_of(const struct pl_train_job *job, size_t i)
{
    return (char **)(uintptr_t)((const char *)job + texts[i].offset);
}

static pl_status take(struct pl_train_job *job, const json_t *root, struct pl_err *err)
{
    const pl_status st = pl_train_spec_read(&job->spec, json_object_get(root, "spec"), NULL, err);
    if (st != PL_OK)
        return st;
    for (size_t i = 0; i < PL_COUNT_OF(texts); i++) {
        const json_t *v = json_object_get(root, texts[i].name);
        const bool required = texts[i].required && !(job->spec.scratch && texts[i].offset == AT(base));
        if (json_is_string(v))
            *text_of(job, i) = pl_xstrdup(json_string_value(v));
        else if (required || (v != NULL && !json_is_null(v)))
            return pl_fail_param(err, PL_EFORMAT, texts[i].name, "job.json: '%s' must be a string, not %s", texts[i].name, pl_json_kind(v));
    }
    const json_t *seed = json_object_get(root, "seed"), *created = json_object_get(root, "created_at");
    if (seed != NULL && (!json_is_integer(seed) || json_integer_value(seed) < 0 || json_integer_value(seed) > UINT32_MAX))
        return pl_fail_param(err, PL_EFORMAT, "seed", "job.json: 'seed' must be an integer from 0 to 4294967295");
    job->spec.seed = (uint32_t)json_integer_value(seed);
    job->created_at = json_integer_value(created);
    return PL_OK;
}

pl_status pl_train_job_read(struct pl_train_job *job, const char *folder, struct pl_err *err)
{
    char *path = NULL;
    void *text = NULL;
    size_t n = 0;
    json_t *root = NULL;
    *job = (struct pl_train_job){0};
    if (asprintf(&path, "%s/job.json", folder) < 0)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    pl_status st = pl_readfile(&text, &n, path, MAX_JOB, err);
    if (st == PL_OK)
        st = pl_json_read(&root, "job.json", text, n, err);
    if (st == PL_OK)
        st = take(job, root, err);
    json_decref(root);
    free(text);
    free(path);
    if (st != PL_OK)
        pl_train_job_fini(job);
    return st;
}

pl_status pl_train_job_write(const struct pl_train_job *job, const char *folder, struct pl_err *err)
{
    char *path = NULL;
    json_t *root = json_object();
    for (size_t i = 0; i < PL_COUNT_OF(texts); i++)
        json_object_set_new(root, texts[i].name, *text_of(job, i) != NULL ? json_string(*text_of(job, i)) : json_null());
    json_object_set_new(root, "spec", pl_train_spec_json(&job->spec));
    json_object_set_new(root, "seed", json_integer(job->spec.seed));
    json_object_set_new(root, "created_at", json_integer(job->created_at));
    char *text = json_dumps(root, JSON_INDENT(1));
    pl_status st = text != NULL && asprintf(&path, "%s/job.json", folder) >= 0 ? PL_OK : pl_fail(err, PL_ENOMEM, "out of memory");
    if (st == PL_OK)
        st = pl_newfile_write(path, text, strlen(text), err);
    free(text);
    free(path);
    json_decref(root);
    return st;
}

pl_status pl_train_base_id(const char *path, char hex[PL_SHA256_HEX], struct pl_err *err)
{
    enum { HEAD = 1 << 20, N_SAMPLES = 64, SAMPLE = 4096 };
    struct pl_sha256 h;
    struct stat is;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    char *block = pl_xcalloc(1, HEAD);
    bool ok = fd >= 0 && fstat(fd, &is) == 0;
    pl_sha256_init(&h);
    for (int i = -1; ok && i <= N_SAMPLES; i++) { /* the head, samples at even distances, the end */
        const off_t last = is.st_size > SAMPLE ? is.st_size - SAMPLE : 0;
        const ssize_t got = pread(fd, block, i < 0 ? HEAD : SAMPLE, i < 0 ? 0 : last / N_SAMPLES * i + (i == N_SAMPLES ? last % N_SAMPLES : 0));
        ok = got >= 0;
        pl_sha256_add(&h, block, ok ? (size_t)got : 0);
    }
    const pl_status st = ok ? PL_OK : pl_fail(err, PL_EIO, "cannot read %s: %s", path, strerror(errno));
    if (ok)
        pl_sha256_add(&h, &(uint64_t){(uint64_t)is.st_size}, sizeof(uint64_t));
    pl_sha256_hex(&h, hex);
    if (fd >= 0)
        close(fd);
    free(block);
    return st;
}

void pl_train_job_fini(struct pl_train_job *job)
{
    for (size_t i = 0; i < PL_COUNT_OF(texts); i++)
        free(*text_of(job, i));
    *job = (struct pl_train_job){0};
}
