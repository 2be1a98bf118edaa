// npm's openai: https://www.npmjs.com/package/openai

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { assert, baseURL, check, city, model, parameters } from "./outcomes.mjs";

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const City = z.strictObject({ name: z.string().max(20), people: z.number().int().min(0).max(99999999) });

await check("chat", async () => {
  const reply = await client.chat.completions.create({ model, messages, max_tokens: 8 });
  assert(typeof reply.choices[0].message.content === "string", "no text");
  assert(reply.usage.completion_tokens <= 8, "too many tokens");
});

await check("stream", async () => {
  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = [];
  for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 8, ...options })) chunks.push(chunk);
  assert(["stop", "length"].includes(chunks.at(-2).choices[0].finish_reason), "no reason");
  assert(chunks.at(-1).usage.completion_tokens <= 8, "no usage");
});

await check("tools", async () => {
  const asked = { model, messages, tools, tool_choice: "required", max_tokens: 200 };
  const reply = await client.chat.completions.create(asked);
  const [call] = reply.choices[0].message.tool_calls;
  assert("city" in JSON.parse(call.function.arguments), "no city");
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  assert(streamed.choices[0].message.tool_calls.length >= 1, "no call in the stream");
});

await check("schema", async () => {
  const reply = await client.chat.completions.parse({
    model,
    messages: [{ role: "user", content: city }],
    response_format: zodResponseFormat(City, "city"),
    max_tokens: 200,
  });
  assert(City.safeParse(reply.choices[0].message.parsed).success, "no city");
});
