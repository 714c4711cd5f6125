/* utf8: validation and stepping (RFC 3629: no overlong forms, no surrogates, at most U+10FFFF).
 * Thread: any.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_UTF8_H
#define PL_BASE_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Decodes one character at s (n > 0 bytes left). Returns its length (1..4) and stores the code point, or
 *   0  when the bytes are a proper but unfinished beginning,
 *  -1  when they can never become a character. */
int pl_utf8_decode(const char *s, size_t n, uint32_t *cp);
/* Writes 1..4 bytes, returns how many. */
size_t pl_utf8_encode(uint32_t cp, char out[4]);
bool pl_utf8_valid(const char *s, size_t n);
/* Characters of a valid text. */
size_t pl_utf8_count(const char *s);
/* How many bytes at the end of s are an unfinished character (0..3). */
size_t pl_utf8_tail(const char *s, size_t n);

#endif
