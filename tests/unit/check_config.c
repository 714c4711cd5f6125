/* check_config: settings from file, environment and flags, their order, and every mistake with its place.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "config/config.h"

Suite *suite_config(void);

static char path[64];

static void write_file(const char *text)
{
    strcpy(path, "/tmp/parley-config-XXXXXX");
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
}

static pl_status load(struct pl_config *c, char **text, int n, char **args)
{
    struct pl_err err = {0};
    char *argv[16] = {"parleyd"};
    for (int i = 0; i < n; i++)
        argv[i + 1] = args[i];
    return pl_config_load(c, n + 1, argv, text, &err);
}
#define LOAD(c, text, ...) load(c, text, (int)(sizeof((char *[]){__VA_ARGS__}) / sizeof(char *)), (char *[]){__VA_ARGS__})

START_TEST(precedence)
{
    struct pl_config c;
    char *text;
    write_file("# a comment\nport = 1\nhost = file\nalias = with spaces\n\nlog-level=debug\n");
    setenv("PARLEY_PORT", "2", 1);
    setenv("PARLEY_QUEUE_LIMIT", "7", 1);
    ck_assert_int_eq(LOAD(&c, &text, "--config", path, "--port=3"), PL_OK);
    ck_assert_ptr_null(text);
    ck_assert_int_eq(c.port, 3);
    ck_assert_int_eq(c.queue_limit, 7);
    ck_assert_str_eq(c.host, "file");
    ck_assert_str_eq(c.alias, "with spaces");
    ck_assert_str_eq(c.log_level, "debug");
    ck_assert_int_eq(c.max_sequences, 64);
    pl_config_fini(&c);
    unlink(path);
}
END_TEST

/* A list's values add up within a source; a stronger source's take the place of a weaker one's. */
START_TEST(lists)
{
    struct pl_config c;
    char *text;
    write_file("adapter = a=/x\nport = 1\nadapter = b = /y;z=1\n");
    unsetenv("PARLEY_PORT"), unsetenv("PARLEY_QUEUE_LIMIT");
    ck_assert_int_eq(LOAD(&c, &text, "--config", path), PL_OK);
    ck_assert_uint_eq(c.adapter.n, 2);
    ck_assert_str_eq(c.adapter.values[0], "a=/x");
    ck_assert_str_eq(c.adapter.values[1], "b=/y;z=1"); /* no blanks around the name or the path */
    pl_config_fini(&c);
    setenv("PARLEY_ADAPTER", "c=/1; d =\t/2 ;", 1);
    ck_assert_int_eq(LOAD(&c, &text, "--config", path), PL_OK);
    ck_assert_uint_eq(c.adapter.n, 2);
    ck_assert_str_eq(c.adapter.values[0], "c=/1");
    ck_assert_str_eq(c.adapter.values[1], "d=/2");
    pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "--config", path, "--adapter", "e=/3", "--adapter=f=/4"), PL_OK);
    ck_assert_uint_eq(c.adapter.n, 2);
    ck_assert_str_eq(c.adapter.values[0], "e=/3");
    ck_assert_str_eq(c.adapter.values[1], "f=/4");
    pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "--adapter", "e=/3", "--adapter=f=/4", "--dump-config"), PL_OK);
    ck_assert_ptr_nonnull(strstr(text, "\nadapter = e=/3\nadapter = f=/4\n"));
    free(text), pl_config_fini(&c);
    setenv("PARLEY_ADAPTER", "ok=/1;broken", 1);
    ck_assert_int_eq(LOAD(&c, &text, "--config", path), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(text, "PARLEY_ADAPTER: adapter must look like NAME=PATH, not \"broken\""));
    free(text), pl_config_fini(&c);
    unsetenv("PARLEY_ADAPTER");
    unlink(path);
}
END_TEST

/* Each row: a file, and what the report must say. */
START_TEST(mistakes)
{
    static const char *const rows[][2] = {
        {"port = 70000", ":1: port must be a whole number from 0 to 65535"},
        {"\nport = 8k", ":2: port must be"},
        {"prot = 1", "did you mean \"port\""},
        {"zzzzzzzzzzzz = 1", "--help lists them all"},
        {"port = 1\nport = 2", ":2: port is set a second time"},
        {"just words", "expected \"key = value\""},
        {"kv-type = q8", "must be one of f16|bf16|f32|q8_0"},
        {"tls-cert = a.pem", "tls-cert and tls-key are set together"},
        {"max-sequences = 100\nbatch-tokens = 50", "batch-tokens (50) must be at least"},
        {"api-key = short", "too short"},
        {"adapter = a=/x\nadapter = /y", ":2: adapter must look like NAME=PATH"},
        {"adapter = =/y", ":1: adapter must look like NAME=PATH"},
        {"adapter = a = ", ":1: adapter must look like NAME=PATH"},
        {"kv-type = f16|bf16", ":1: kv-type must be one of"},
        {"port = x\nthreads = y", ":2: threads must be"}, /* all of them at once */
    };
    struct pl_config c;
    char *text;
    unsetenv("PARLEY_PORT"), unsetenv("PARLEY_QUEUE_LIMIT");
    write_file(rows[_i][0]);
    ck_assert_int_eq(LOAD(&c, &text, "--config", path), PL_EINVAL);
    ck_assert_msg(strstr(text, rows[_i][1]) != NULL, "\"%s\" is not in \"%s\"", rows[_i][1], text);
    free(text);
    pl_config_fini(&c);
    unlink(path);
}
END_TEST

START_TEST(flags)
{
    struct pl_config c;
    char *text;
    ck_assert_int_eq(LOAD(&c, &text, "--port"), PL_EINVAL);
    free(text), pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "model.gguf"), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(text, "--model FILE"));
    free(text), pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "--config", "/no/such/file"), PL_EINVAL);
    free(text), pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "--help"), PL_OK);
    for (const char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1)
        ck_assert_msg(end - line <= 100, "%.*s", (int)(end - line), line);
    free(text), pl_config_fini(&c);
}
END_TEST

/* --check-config opens the eyes for files, all of them at once; a start has its own say about each. */
START_TEST(check_files)
{
    struct pl_config c;
    char *text;
    write_file("a file\n");
    ck_assert_int_eq(LOAD(&c, &text, "--check-config"), PL_EINVAL);
    ck_assert_str_eq(text, "model: is not set: name a GGUF file");
    free(text), pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "--model", path, "--adapter-dir", "/tmp", "--adapter", "a=/tmp", "--check-config"), PL_OK);
    ck_assert_str_eq(text, "the configuration is valid\n");
    free(text), pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "--model", "/tmp", "--adapter-dir", path, "--add-model", "b=/no/such/file", "--check-config"), PL_EINVAL);
    char want[256];
    snprintf(want, sizeof want,
             "model: /tmp is not a regular file\nadd-model: cannot read /no/such/file: No such file or directory\nadapter-dir: %s is not a folder", path);
    ck_assert_str_eq(text, want);
    free(text), pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "--model", "/no/such/file"), PL_OK);
    pl_config_fini(&c);
    unlink(path);
}
END_TEST

/* What --dump-config prints is what deploy/parley.conf has, it can be read again, and keys stay secret. */
START_TEST(dump)
{
    struct pl_config c;
    char *text, *again, sample[32768] = "";
    ck_assert_int_eq(LOAD(&c, &text, "--dump-config"), PL_OK);
    FILE *f = fopen("deploy/parley.conf", "r");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_gt(fread(sample, 1, sizeof sample - 1, f), 0);
    fclose(f);
    ck_assert_str_eq(text, sample);
    free(text), pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &text, "--dump-config", "--api-key", "very-secret-key", "--port", "99"), PL_OK);
    ck_assert_ptr_null(strstr(text, "very-secret"));
    ck_assert_ptr_nonnull(strstr(text, "\nport = 99\n"));
    write_file(text);
    free(text), pl_config_fini(&c);
    ck_assert_int_eq(LOAD(&c, &again, "--config", path), PL_OK);
    ck_assert_int_eq(c.port, 99);
    pl_config_fini(&c);
    unlink(path);
}
END_TEST

Suite *suite_config(void)
{
    Suite *s = suite_create("config");
    TCase *t = tcase_create("config");
    tcase_add_test(t, precedence);
    tcase_add_test(t, lists);
    tcase_add_loop_test(t, mistakes, 0, 14);
    tcase_add_test(t, flags);
    tcase_add_test(t, check_files);
    tcase_add_test(t, dump);
    suite_add_tcase(s, t);
    return s;
}
