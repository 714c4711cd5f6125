/* layouts: the packed layouts that occur (see struct pl_cpu_part), for the macro LAYOUT(bits, sub, has_min, half_scales)
 * that the including file has defined. Included more than once on purpose.
 * SPDX-License-Identifier: Apache-2.0 */
#ifdef LAYOUT
LAYOUT(4, 32, 0, 1) /* Q4_0 */
LAYOUT(4, 32, 1, 1) /* Q4_1 */
LAYOUT(8, 32, 0, 1) /* Q5_0, Q8_0 */
LAYOUT(8, 32, 1, 1) /* Q5_1 */
LAYOUT(4, 16, 1, 0) /* Q2_K */
LAYOUT(4, 16, 0, 0) /* Q3_K */
LAYOUT(4, 32, 1, 0) /* Q4_K */
LAYOUT(8, 32, 1, 0) /* Q5_K */
LAYOUT(8, 16, 0, 0) /* Q6_K */
#endif
