// story: what test_js.py has the official JavaScript client do: node story.mjs BASE_URL story|control TRAINING VALIDATION. Prints JSON.
// SPDX-License-Identifier: Apache-2.0
import fs from "node:fs";
import { File } from "node:buffer";
import OpenAI from "openai";

globalThis.File ??= File; // Node 18
const [url, what, training, validation] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const jobs = client.fineTuning.jobs;
const out = {};

async function until(job, ...states) {
  for (;;) {
    const now = await jobs.retrieve(job);
    if (states.includes(now.status)) return now;
    if (["succeeded", "failed", "cancelled"].includes(now.status)) throw new Error(`${now.status}: ${JSON.stringify(now.error)}`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

async function all(page) {
  const list = [];
  for await (const item of page) list.push(item);
  return list;
}

async function refused(promise) {
  try {
    await promise;
  } catch (e) {
    return { name: e.constructor.name, status: e.status, code: e.code, param: e.param };
  }
  return null;
}

async function upload(path) {
  return client.files.create({ file: fs.createReadStream(path), purpose: "fine-tune" });
}

async function story() {
  const files = [await upload(training), await upload(validation)];
  out.files = files.map((f) => ({ bytes: f.bytes, status: f.status, filename: f.filename }));
  const made = await jobs.create({
    model: "tiny", training_file: files[0].id, validation_file: files[1].id, suffix: "js", seed: 3, metadata: { from: "node" },
    method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 8, batch_size: 2, learning_rate: 0.02 }, peft: { rank: 8 } } },
  });
  let seen = [];
  while (!seen.includes("The job has successfully completed")) {
    const page = await jobs.listEvents(made.id, { limit: 20 });
    seen = page.data.map((e) => e.message);
    const now = await jobs.retrieve(made.id);
    if (["failed", "cancelled"].includes(now.status)) throw new Error(JSON.stringify(now.error));
    await new Promise((done) => setTimeout(done, 100));
  }
  const job = await until(made.id, "succeeded");
  out.job = job;
  out.events = await all(jobs.listEvents(made.id, { limit: 10 })); // many pages
  out.checkpoints = await all(jobs.checkpoints.list(made.id, { limit: 1 }));
  const ask = { messages: [{ role: "user", content: "a lamp" }], temperature: 0, max_tokens: 24 };
  out.answer = (await client.chat.completions.create({ model: job.fine_tuned_model, ...ask })).choices[0].message.content;
  out.checkpoint_answer = (await client.chat.completions.create({ model: out.checkpoints[0].fine_tuned_model_checkpoint, ...ask })).choices[0].message.content;
  out.streamed = "";
  for await (const chunk of await client.chat.completions.create({ model: job.fine_tuned_model, stream: true, ...ask }))
    out.streamed += chunk.choices[0]?.delta?.content ?? "";
  out.models = (await all(client.models.list())).map((m) => m.id);
  out.csv = await (await client.files.content(job.result_files[0])).text();
  out.deleted = await client.models.delete(job.fine_tuned_model);
  out.gone = await refused(client.chat.completions.create({ model: job.fine_tuned_model, ...ask }));
}

async function control() {
  const file = await upload(training);
  const make = (suffix) => jobs.create({ model: "tiny", training_file: file.id, suffix });
  const first = await make("one");
  await until(first.id, "running");
  out.paused = (await jobs.pause(first.id)).status;
  await until(first.id, "paused");
  out.resumed = (await jobs.resume(first.id)).status;
  await until(first.id, "running");
  out.cancelled = (await jobs.cancel(first.id)).status;
  await until(first.id, "cancelled");
  out.again = await refused(jobs.pause(first.id));
  for (const name of ["two", "three", "four"]) await make(name);
  const page = await jobs.list({ limit: 2 });
  out.page = { n: page.data.length, more: page.hasNextPage(), next: (await page.getNextPage()).data.length };
  out.list = (await all(jobs.list({ limit: 1 }))).map((j) => j.user_provided_suffix);
  out.unknown = await refused(jobs.retrieve("ftjob-none"));
  out.bad = await refused(jobs.create({ model: "tiny", training_file: file.id, seed: -1 }));
  for (const job of await all(jobs.list())) if (job.status !== "cancelled") await jobs.cancel(job.id);
  out.files = (await all(client.files.list({ purpose: "fine-tune" }))).map((f) => f.id);
  out.file_deleted = await client.files.delete(file.id);
  out.file = file.id;
}

await { story, control }[what]();
console.log(JSON.stringify(out));
