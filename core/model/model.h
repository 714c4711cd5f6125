/* model: a GPT read from a GGUF file and its forward pass, for every architecture and device.
 * Thread: load on one thread; forward on the engine's thread only.  Owns: weights on the device, its copy of the
 * hyper-parameters; borrows device and file (the file until pl_model_free).
 * Fails: PL_ENOTSUP (architecture, tensor type or rope variant, by name), PL_ERANK (of several ranks), PL_EFORMAT (missing key or tensor, wrong
 * shape, by name), PL_ENOMEM, PL_EDEVICE.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_MODEL_H
#define PL_MODEL_MODEL_H

#include "core/device/device.h"
#include "core/model/spec.h"

struct pl_comm;
struct pl_model;
struct pl_gguf;

/* max_tokens, max_rows: the largest batch that forward will be given; its work buffers are made now.
 * n_threads-parallel repacking is the device's business. */
pl_status pl_model_load(struct pl_model **out, const struct pl_gguf *g, struct pl_device *dev, uint32_t max_tokens,
                        uint32_t max_rows, struct pl_err *err) PL_MUST_CHECK;
/* The same as one rank of several, each of which loads and computes its part (part.h). comm: borrowed. All ranks call
 * pl_model_forward side by side, with equal batches. */
pl_status pl_model_load_part(struct pl_model **out, const struct pl_gguf *g, struct pl_device *dev, struct pl_comm *comm, uint32_t max_tokens,
                             uint32_t max_rows, struct pl_err *err) PL_MUST_CHECK;
/* Reads the hyper-parameters and checks that every tensor is there and of its shape, without loading any.
 * n_params may be NULL. */
pl_status pl_model_check(struct pl_spec *spec, unsigned *arch_bit, uint64_t *n_params, const struct pl_gguf *g, struct pl_err *err) PL_MUST_CHECK;
/* freq[rope_dims / 2]: rotation per position of each pair of a head; factors [rope_dims / 2] or NULL. PL_EFORMAT for a bad factor. */
pl_status pl_model_rope_freq(const struct pl_spec *s, const float *factors, float *freq, struct pl_err *err) PL_MUST_CHECK;
void pl_model_free(struct pl_model *m);
const struct pl_spec *pl_model_spec(const struct pl_model *m);
uint64_t pl_model_n_params(const struct pl_model *m);

/* Shape of this model's cache for pages of page_size tokens: of all ranks together, and of this rank's part. */
struct pl_kv_shape pl_model_kv_shape(const struct pl_model *m, uint32_t page_size, uint32_t n_pages, pl_dtype dtype);
struct pl_kv_shape pl_model_kv_part(const struct pl_model *m, uint32_t page_size, uint32_t n_pages, pl_dtype dtype);

/* One forward pass over the batch: writes the batch's K and V, and sets *logits to [n_rows, V] (host memory, borrowed
 * until the next forward; V = spec->n_vocab). NULL when n_rows is 0, on ranks other than 0, and where b->draws are given, which takes
 * a device that samples: b->drawn is then what came of the rows. PL_EIO: the model's file was cut off. Token ids must be below n_vocab and
 * positions below the context: the caller has checked them. */
pl_status pl_model_forward(struct pl_model *m, struct pl_kvdev *kv, const struct pl_batch *b, const float **logits) PL_MUST_CHECK;

/* Where the device has a memory of its own, which the cache takes the rest of: ahead of that, takes what passes with adapters work in beside what other
 * passes do. Else the first adapter's pl_model_adapter_add takes it. PL_ENOMEM with param "batch-tokens". */
pl_status pl_model_reserve_adapters(struct pl_model *m, struct pl_err *err) PL_MUST_CHECK;
/* On any thread, while passes run: copies what is in a to the device (its shapes are those of this model's spec). */
struct pl_adapter;
struct pl_adapter_wire;
struct pl_lora_set;
pl_status pl_model_adapter_make(struct pl_lora_set **out, const struct pl_model *m, const struct pl_adapter *a, struct pl_err *err) PL_MUST_CHECK;
/* What rank 0 of several tells the others of it (adapter_wire.h), until it is added. */
const struct pl_adapter_wire *pl_model_adapter_wire(const struct pl_lora_set *s);
void pl_model_adapter_free(const struct pl_model *m, struct pl_lora_set *s); /* of one that is in no slot; NULL is allowed */
/* Adapters are held in slots, 1 and up; a batch names them by slot. On the thread that calls forward, between two passes:
 * moves s into an empty slot; when it fails s stays the caller's. */
pl_status pl_model_adapter_add(struct pl_model *m, uint32_t slot, struct pl_lora_set *s, struct pl_err *err) PL_MUST_CHECK;
void pl_model_adapter_remove(struct pl_model *m, uint32_t slot); /* and frees what was in it */

#endif
