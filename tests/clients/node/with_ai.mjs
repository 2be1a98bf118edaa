// npm's ai with its provider for servers of OpenAI's protocol: https://www.npmjs.com/package/ai

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";
import { z } from "zod";
import { assert, baseURL, check, city, model, parameters } from "./outcomes.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const provider = createOpenAICompatible({ name: "local", baseURL, apiKey: "none", supportsStructuredOutputs: true });
const local = { model: provider(model), maxRetries: 0 };
const City = z.strictObject({ name: z.string().max(20), people: z.number().int().min(0).max(99999999) });

await check("chat", async () => {
  const reply = await generateText({ ...local, prompt: "Hello", maxOutputTokens: 8 });
  assert(reply.usage.outputTokens <= 8, "no usage");
});

await check("stream", async () => {
  let failure = null;
  const reply = streamText({ ...local, prompt: "Hello", maxOutputTokens: 8, onError: ({ error }) => (failure = error) });
  let count = 0;
  for await (const _ of reply.textStream) count += 1;
  if (failure) throw failure;
  assert(count > 1, "not streamed");
});

await check("tools", async () => {
  const tools = { weather: tool({ description: "The weather of a city", inputSchema: jsonSchema(parameters) }) };
  const reply = await generateText({ ...local, prompt: "Hello", tools, toolChoice: "required", maxOutputTokens: 200 });
  assert("city" in reply.toolCalls[0].input, "no city");
});

await check("schema", async () => {
  const output = Output.object({ schema: City });
  const reply = await generateText({ ...local, prompt: city, output, maxOutputTokens: 200 });
  assert(City.safeParse(reply.output).success, "no city");
});
