/* check_multipart: forms whole and in pieces of every size, boundaries that nearly match, and malformed ones; SHA-256 of known texts.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/multipart.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/base/md5.h"
#include "core/base/sha256.h"

Suite *suite_multipart(void);

static pl_status begin(void *arg, const char *name, const char *filename, struct pl_err *err)
{
    (void)err;
    pl_buf_addf(arg, "<%s|%s>", name, filename != NULL ? filename : "-");
    return PL_OK;
}

static pl_status data(void *arg, const char *bytes, size_t n, struct pl_err *err)
{
    (void)err;
    pl_buf_add(arg, bytes, n);
    return PL_OK;
}

static pl_status end(void *arg, struct pl_err *err)
{
    (void)err;
    pl_buf_adds(arg, "</>");
    return PL_OK;
}

/* The body in pieces of n bytes. */
static pl_status parse(const char *type, const char *body, size_t n_body, size_t n, struct pl_buf *out, struct pl_err *err)
{
    struct pl_multipart *m = NULL;
    const struct pl_multipart_sink sink = {begin, data, end, out};
    pl_buf_init(out, 0);
    *err = (struct pl_err){0};
    pl_status st = pl_multipart_new(&m, type, &sink, err);
    for (size_t i = 0; i < n_body && st == PL_OK; i += n) {
        char *piece = malloc(n); /* of its own size, so that a sanitizer sees a read beyond */
        const size_t left = n_body - i < n ? n_body - i : n;
        memcpy(piece, body + i, left);
        st = pl_multipart_take(m, piece, left, err);
        free(piece);
    }
    if (st == PL_OK)
        st = pl_multipart_finish(m, err);
    pl_multipart_free(m);
    return st;
}

#define TYPE "multipart/form-data; boundary=aab"
#define PART(name, more, text) "--aab\r\nContent-Disposition: form-data; name=\"" name "\"" more "\r\n\r\n" text "\r\n"

static const struct {
    const char *type, *body, *out;
} good[] = {
    {TYPE, PART("purpose", "", "fine-tune") PART("file", "; filename=\"a.jsonl\"", "{}\n{}\n") "--aab--\r\n",
     "<purpose|->fine-tune</><file|a.jsonl>{}\n{}\n</>"},
    {"multipart/form-data;charset=utf-8; boundary=\"aab\"",
     "preamble\r\n" PART("file", "; filename=a\r\nContent-Type: text/plain", "x") "--aab--epilogue --aab",
     "<file|a>x</>"},
    {TYPE, PART("x", "", "\r\n--aa\r\n--aaa\r\n--\r\r\n--aaab\r\n-") "--aab  \r\nCONTENT-DISPOSITION:form-data;name=y\r\n\r\n\r\n--aab--",
     "<x|->\r\n--aa\r\n--aaa\r\n--\r\r\n--aaab\r\n-</><y|-></>"},
    {TYPE, PART("file", "; filename=\"a\\\"b%22;c.txt\"", "") "--aab--", "<file|a\"b\";c.txt></>"},
    {TYPE, PART("file", "; filename=\"\xe4\xbd\xa0.txt\"; filename*=utf-8''x", "\r\n\r\n--aa") "--aab--", "<file|\xe4\xbd\xa0.txt>\r\n\r\n--aa</>"},
    {TYPE, "--aab--", ""},
    {"MULTIPART/FORM-DATA; BOUNDARY=-", "---\r\nContent-Disposition: form-data; name=a\r\n\r\n-\r\n--\r\n\r\n-----", "<a|->-\r\n--\r\n</>"},
};

START_TEST(whole)
{
    const char *body = good[_i].body;
    for (size_t n = 1; n <= strlen(body); n++) {
        struct pl_buf out;
        struct pl_err err;
        const pl_status st = parse(good[_i].type, body, strlen(body), n, &out, &err);
        ck_assert_msg(st == PL_OK, "%s", err.msg);
        ck_assert_str_eq(pl_buf_str(&out), good[_i].out);
        pl_buf_fini(&out);
    }
}
END_TEST

static const struct {
    const char *type, *body, *message;
} bad[] = {
    {NULL, "", "must be a form"},
    {"application/json", "", "must be a form"},
    {"multipart/form-data", "", "needs a boundary"},
    {"multipart/form-data; boundary=", "", "needs a boundary"},
    {"multipart/form-data; boundary=\"aab", "", "needs a boundary"},
    {"multipart/form-data; boundary=123456789012345678901234567890123456789012345678901234567890123456789012345", "", "needs a boundary"},
    {TYPE, "", "ends before its last boundary"},
    {TYPE, PART("x", "", "abc"), "ends before its last boundary"},
    {TYPE, PART("x", "", "abc") "--aab-", "ends before its last boundary"},
    {TYPE, PART("x", "", "abc") "--aabx", "followed by something else"},
    {TYPE, "--aab\r\nContent-Disposition: attachment; name=x\r\n\r\n\r\n--aab--", "no Content-Disposition: form-data"},
    {TYPE, "--aab\r\n\r\nabc\r\n--aab--", "no Content-Disposition: form-data"},
    {TYPE, "--aab\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--aab--", "no Content-Disposition: form-data"},
    {TYPE, "--aab\r\nContent-Disposition: form-data; name=\"x\r\n\r\nabc\r\n--aab--", "no Content-Disposition: form-data"},
    {TYPE, "--aab\r\nContent-Disposition: form-data; name=\"\xff\"\r\n\r\nabc\r\n--aab--", "not UTF-8"},
};

START_TEST(malformed)
{
    for (size_t n = 1; n < 100; n += 7) {
        struct pl_buf out;
        struct pl_err err;
        ck_assert_int_eq(parse(bad[_i].type, bad[_i].body, strlen(bad[_i].body), n, &out, &err), PL_EINVAL);
        ck_assert_msg(strstr(err.msg, bad[_i].message) != NULL, "%s", err.msg);
        pl_buf_fini(&out);
    }
}
END_TEST

START_TEST(bounded)
{
    struct pl_buf body, out;
    struct pl_err err;
    pl_buf_init(&body, 0);
    pl_buf_adds(&body, "--aab\r\nX: ");
    for (int i = 0; i < PL_MULTIPART_MAX_HEAD; i++)
        pl_buf_addc(&body, 'x');
    ck_assert_int_eq(parse(TYPE, body.data, body.len, 1000, &out, &err), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(err.msg, "head is longer"));
    pl_buf_fini(&out);
    pl_buf_clear(&body);
    for (int i = 0; i <= PL_MULTIPART_MAX_PARTS; i++)
        pl_buf_adds(&body, PART("x", "", ""));
    ck_assert_int_eq(parse(TYPE, body.data, body.len, 1000, &out, &err), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(err.msg, "more than 64 parts"));
    pl_buf_fini(&out);
    pl_buf_clear(&body);
    pl_buf_adds(&body, "--aab\r\nContent-Disposition: form-data; name=file; filename=");
    for (int i = 0; i < 256; i++)
        pl_buf_addc(&body, 'x');
    pl_buf_adds(&body, "\r\n\r\n\r\n--aab--");
    ck_assert_int_eq(parse(TYPE, body.data, body.len, 1000, &out, &err), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(err.msg, "at most 255 bytes"));
    pl_buf_fini(&out);
    pl_buf_fini(&body);
}
END_TEST

/* Random bytes of a small alphabet: the content comes out as it went in, at any cut. */
START_TEST(random_content)
{
    uint64_t rng = 88172645463325252u;
    for (int round = 0; round < 2000; round++) {
        static const char letters[] = "\r\n--aab x";
        struct pl_buf body, out;
        struct pl_err err;
        char content[64];
        size_t n = 0;
        rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
        for (uint64_t r = rng; n < rng % 60; n++, r = r * 6364136223846793005u + 1)
            content[n] = letters[(r >> 33) % (sizeof letters - 1)];
        content[n] = '\0';
        if (strstr(content, "\r\n--aab") != NULL || strncmp(content, "--aab", 5) == 0)
            continue;
        pl_buf_init(&body, 0);
        pl_buf_adds(&body, "--aab\r\nContent-Disposition: form-data; name=x\r\n\r\n");
        pl_buf_adds(&body, content);
        pl_buf_adds(&body, "\r\n--aab--");
        ck_assert_msg(parse(TYPE, body.data, body.len, 1 + rng % 9, &out, &err) == PL_OK, "%s", err.msg);
        ck_assert_int_eq(out.len, n + 5 + 3);
        ck_assert_int_eq(memcmp(out.data + 5, content, n), 0);
        pl_buf_fini(&out);
        pl_buf_fini(&body);
    }
}
END_TEST

START_TEST(sha256)
{
    static const struct {
        const char *text;
        int times;
        const char *hex;
    } known[] = { /* FIPS 180-2, appendix B */
        {"abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"aaaaaaaaaa", 100000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
        {"", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    };
    for (size_t i = 0; i < PL_COUNT_OF(known); i++) {
        struct pl_sha256 h;
        char hex[PL_SHA256_HEX];
        pl_sha256_init(&h);
        for (int k = 0; k < known[i].times; k++)
            pl_sha256_add(&h, known[i].text, strlen(known[i].text));
        pl_sha256_hex(&h, hex);
        ck_assert_str_eq(hex, known[i].hex);
    }
}
END_TEST

START_TEST(md5)
{
    static const struct {
        const char *text;
        int times;
        const char *hex;
    } known[] = { /* RFC 1321, A.5; the last from md5sum */
        {"", 1, "d41d8cd98f00b204e9800998ecf8427e"},
        {"abc", 1, "900150983cd24fb0d6963f7d28e17f72"},
        {"message digest", 1, "f96b697d7cb7938d525a2f31aaf161d0"},
        {"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789", 1, "d174ab98d277d9f5a5611c2c9f419d9f"},
        {"12345678901234567890123456789012345678901234567890123456789012345678901234567890", 1, "57edf4a22be3c955ac49da2e2107b67a"},
        {"a", 1000000, "7707d6ae4e027c70eea2a935c2296f21"},
    };
    for (size_t i = 0; i < PL_COUNT_OF(known); i++) {
        struct pl_md5 h;
        char hex[PL_MD5_HEX];
        pl_md5_init(&h);
        for (int k = 0; k < known[i].times; k++)
            pl_md5_add(&h, known[i].text, strlen(known[i].text));
        pl_md5_hex(&h, hex);
        ck_assert_str_eq(hex, known[i].hex);
    }
}
END_TEST

Suite *suite_multipart(void)
{
    Suite *s = suite_create("multipart");
    TCase *c = tcase_create("all");
    tcase_add_loop_test(c, whole, 0, PL_COUNT_OF(good));
    tcase_add_loop_test(c, malformed, 0, PL_COUNT_OF(bad));
    tcase_add_test(c, bounded);
    tcase_add_test(c, random_content);
    tcase_add_test(c, sha256);
    tcase_add_test(c, md5);
    suite_add_tcase(s, c);
    return s;
}
