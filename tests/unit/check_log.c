/* check_log: a line of the log stays one line, whatever is said in it, and nobody waits for whoever reads the log.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"

#define PL_LOG_MODULE "test"

Suite *suite_log(void);

static int ends[2];

static void open_pipe(bool json)
{
    ck_assert_int_eq(pipe(ends), 0);
    pl_log_setup(PL_LOG_INFO, json, ends[1]);
}

static const char *what_came(void)
{
    static char text[16384];
    const ssize_t n = read(ends[0], text, sizeof text - 1);
    ck_assert_int_gt(n, 0);
    text[n] = '\0';
    return text;
}

/* The test's own time limit ends it if a line is waited for. */
START_TEST(stalled)
{
    open_pipe(false);
    const uint64_t start = pl_log_dropped();
    int written = 0;
    while (pl_log_dropped() < start + 10) {
        pl_log_info("a line that nobody reads, number %d", written++);
        ck_assert_int_lt(written, 1 << 20);
    }
    ck_assert_int_gt(written, 100);
    for (int turns = 0; turns < 4; turns++) /* read on, and lines come again */
        (void)what_came();
    const uint64_t before = pl_log_dropped();
    char lost[64];
    snprintf(lost, sizeof lost, " warn  log: %u lines of this log were lost", (unsigned)(before - start));
    pl_log_info("the reader is back");
    pl_log_info("and stays");
    ck_assert_uint_eq(pl_log_dropped(), before);
    const char *text = what_came(), *told = strstr(text, lost);
    ck_assert_msg(told != NULL && strstr(told + strlen(lost), "of this log were lost") == NULL, "%s", text);
    ck_assert(strstr(told, "the reader is back") != NULL && strstr(told, "and stays") != NULL);
}
END_TEST

/* Lines of more than a page of the pipe, from all at once: whoever sees room still has it when it writes. */
static void *talk(void *text)
{
    for (int i = 0; i < 30; i++)
        pl_log_info("%s", (const char *)text);
    return NULL;
}

START_TEST(many_stalled)
{
    enum { TALKERS = 8, TURNS = 40 };
    char text[1000];
    memset(text, '\x01', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    for (int turn = 0; turn < TURNS; turn++) {
        pthread_t talker[TALKERS];
        open_pipe(turn % 2 == 0);
        for (int i = 0; i < TALKERS; i++)
            ck_assert_int_eq(pthread_create(&talker[i], NULL, talk, text), 0);
        for (int i = 0; i < TALKERS; i++)
            pthread_join(talker[i], NULL);
        close(ends[0]);
        close(ends[1]);
    }
    ck_assert_uint_gt(pl_log_dropped(), 0);
}
END_TEST

/* The end of a long line finds no room: what comes next begins a line of its own. */
START_TEST(torn)
{
    char text[1000];
    memset(text, '\x01', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    const uint64_t before = pl_log_dropped();
    open_pipe(true);
    ck_assert_int_eq(fcntl(ends[1], F_SETPIPE_SZ, 8192), 8192); /* two pages, of which a line this long takes two */
    pl_log_info("first");
    pl_log_info("%s", text);
    ck_assert_uint_eq(pl_log_dropped(), before + 1);
    (void)what_came();
    pl_log_info("whole");
    const char *after = what_came();
    ck_assert_msg(after[0] == '\n' && strstr(after, "1 lines of this log were lost") != NULL && strstr(after, "\"whole\"") != NULL, "%s", after);
}
END_TEST

START_TEST(one_line)
{
    open_pipe(false);
    pl_log_info("a model named %s", "x\n2026-01-01T00:00:00.000Z error main: forged\r\x1b[2J");
    const char *text = what_came();
    ck_assert_ptr_eq(strchr(text, '\n'), text + strlen(text) - 1);
    ck_assert_ptr_null(strpbrk(text, "\r\x1b"));
    ck_assert_ptr_nonnull(strstr(text, "a model named x\\x0a2026-01-01T00:00:00.000Z error main: forged\\x0d\\x1b[2J"));
}
END_TEST

START_TEST(valid_json)
{
    char cut[1100] = "";
    for (size_t i = 0; i + 2 < sizeof cut; i += 2) /* a message is cut at 1023 bytes: in the middle of one of these */
        strcat(cut, "\xc3\xa9");
    const struct pl_log_field f = {.key = "file", .kind = PL_LOG_STR, .s = "\xff\xfe"};
    open_pipe(true);
    pl_log_info("%s", cut);
    pl_log_event(PL_LOG_INFO, PL_LOG_MODULE, "request", &f, 1);
    const char *text = what_came(), *second = strchr(text, '\n') + 1;
    json_error_t why;
    json_t *a = json_loadb(text, (size_t)(second - text), 0, &why), *b = json_loads(second, 0, &why);
    ck_assert_msg(a != NULL && b != NULL, "%s", why.text);
    ck_assert_str_eq(json_string_value(json_object_get(b, "file")), "\xef\xbf\xbd\xef\xbf\xbd");
    json_decref(a);
    json_decref(b);
}
END_TEST

Suite *suite_log(void)
{
    Suite *s = suite_create("log");
    TCase *t = tcase_create("log");
    tcase_add_test(t, stalled);
    tcase_add_test(t, many_stalled);
    tcase_add_test(t, torn);
    tcase_add_test(t, one_line);
    tcase_add_test(t, valid_json);
    suite_add_tcase(s, t);
    return s;
}
