/* model: a GPT read from a GGUF file; what the rest of the engine may know about it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/model.h"

#include "core/model/weights.h"

const struct pl_spec *pl_model_spec(const struct pl_model *m)
{
    return &m->spec;
}

uint64_t pl_model_n_params(const struct pl_model *m)
{
    return m->n_params;
}

struct pl_kv_shape pl_model_kv_shape(const struct pl_model *m, uint32_t page_size, uint32_t n_pages, pl_dtype dtype)
{
    return (struct pl_kv_shape){
        .n_layers = m->spec.n_layers,
        .n_kv_heads = m->spec.n_kv_heads,
        .head_dim = m->spec.head_dim,
        .page_size = page_size,
        .n_pages = n_pages,
        .dtype = dtype,
    };
}

struct pl_kv_shape pl_model_kv_part(const struct pl_model *m, uint32_t page_size, uint32_t n_pages, pl_dtype dtype)
{
    struct pl_kv_shape s = pl_model_kv_shape(m, page_size, n_pages, dtype);
    s.n_kv_heads = m->own.n_kv_heads;
    return s;
}
