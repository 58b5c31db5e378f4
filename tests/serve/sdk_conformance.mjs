// Asks a gateway with the openai SDK and prints what it saw, as one JSON object.
// Usage: node sdk_conformance.mjs URL < {"cases": [...], "tool": {...}}
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const url = process.argv[2];
const { cases, tool } = JSON.parse(readFileSync(0, "utf8"));
const messages = [{ role: "user", content: "How is the weather?" }];
const TIMEOUT = 60_000;
const seen = {};

function client(maxRetries, answers = []) {
  const told = async (input, init) => {
    const answer = await fetch(input, init);
    answers.push({
      status: answer.status,
      afterMs: answer.headers.get("retry-after-ms"),
      count: new Headers(init.headers).get("x-stainless-retry-count"),
    });
    return answer;
  };
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries, timeout: TIMEOUT, fetch: told });
}

// The SDK's waits between attempts are noted, and over at once; node's own timers (of kept connections) are left alone.
const later = globalThis.setTimeout;
async function noting(beforeWaiting, work) {
  const waits = [];
  globalThis.setTimeout = (call, ms, ...more) => {
    if (ms === TIMEOUT || !/openai.*sleep/.test(new Error().stack)) return later(call, ms, ...more);
    waits.push(ms);
    beforeWaiting();
    return later(call, 1, ...more);
  };
  try {
    await work();
  } finally {
    globalThis.setTimeout = later;
  }
  return waits;
}

const plain = client(0);
seen.errors = {};
for (const one of cases) {
  try {
    await plain.chat.completions.create({ model: one.model, messages, ...one.body }, { headers: one.headers });
  } catch (error) {
    const { status, code, type, requestID } = error;
    seen.errors[one.name] = {
      raised: error.constructor.name, status, code: String(code), typed: Boolean(type), named: Boolean(requestID),
      right: error instanceof OpenAI[one.raised],
    };
  }
}

seen.attempts = {};
for (const one of cases) {
  const answers = [];
  const asking = client(1, answers);
  const waits = await noting(() => {}, async () => {
    await asking.chat.completions
      .create({ model: one.model, messages, ...one.body }, { headers: one.headers })
      .catch(() => {});
  });
  const told = answers.slice(0, -1).map((answer) => answer.afterMs);
  seen.attempts[one.name] = { count: answers.length, told: told.map(Number), waits };
}

{
  const answers = [];
  const holding = await plain.chat.completions.create({ model: "again", messages, stream: true });
  const waits = await noting(() => holding.controller.abort(), async () => {
    const answer = await client(2, answers).chat.completions.create({ model: "again", messages });
    seen.again = { text: answer.choices[0].message.content };
  });
  Object.assign(seen.again, { answers, waits });
}

{
  const answer = await plain.chat.completions.create({ model: "good", messages });
  const stream = plain.chat.completions.stream({ model: "good", messages, stream_options: { include_usage: true } });
  let deltas = "";
  stream.on("content", (delta) => (deltas += delta));
  const final = await stream.finalChatCompletion();
  const text = final.choices[0].message.content;
  seen.text = { whole: answer.choices[0].message.content, deltas, text, usage: final.usage };
}

{
  const stream = plain.chat.completions.stream({ model: "calling", messages, tools: [tool] });
  const names = [];
  stream.on("tool_calls.function.arguments.done", (event) => names.push(event.name));
  const final = await stream.finalChatCompletion();
  seen.tools = { names, parsed: final.choices[0].message.tool_calls[0].function.parsed_arguments };
}

{
  const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
  const format = { type: "json_schema", json_schema: { name: "place", strict: true, schema } };
  const answer = await plain.chat.completions.parse({ model: "structured", messages, response_format: format });
  seen.structured = answer.choices[0].message.parsed;
}

try {
  const stream = await plain.chat.completions.create({ model: "breaking", messages, n: 2, stream: true });
  for await (const _ of stream);
} catch (error) {
  seen.broken = { code: error.code, right: error instanceof OpenAI.APIError };
}

{
  const stream = await plain.chat.completions.create({ model: "slow", messages, stream: true });
  for await (const _ of stream) break; // which aborts it
  const leaving = new AbortController();
  const other = await plain.chat.completions.create({ model: "slow", messages, stream: true }, { signal: leaving.signal });
  for await (const _ of other) leaving.abort();
  const controller = new AbortController();
  const whole = plain.chat.completions.create({ model: "slow", messages }, { signal: controller.signal });
  later(() => controller.abort(), 200);
  seen.aborted = await whole.catch((error) => error instanceof OpenAI.APIUserAbortError);
}

seen.models = (await plain.models.list()).data.map((model) => model.id);
process.stdout.write(JSON.stringify(seen));
