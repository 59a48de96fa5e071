// The `openai` package for Node, and Vercel's `ai` with `@ai-sdk/openai-compatible`.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, jsonSchema, Output, streamText, tool } from "ai";
import assert from "node:assert/strict";
import OpenAI from "openai";

const url = process.env.LMX_TEST_URL + "/v1";
const model = process.env.LMX_TEST_MODEL;
const embedder = process.env.LMX_TEST_EMBEDDER;
const question = [{ role: "user", content: "What is the capital of France? Answer in one word." }];
const greedy = { temperature: 0, max_tokens: 60 };
const weather = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, unit: { enum: ["C", "F"] } },
  required: ["city", "unit"],
  additionalProperties: false,
};
const person = {
  type: "object",
  properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 150 } },
  required: ["name", "age"],
  additionalProperties: false,
};
const client = new OpenAI({ baseURL: url, apiKey: "not-needed", maxRetries: 0, timeout: 120_000 });
const ask = (more = {}) => client.chat.completions.create({ model, messages: question, ...greedy, ...more });
const weatherTool = { type: "function", function: { name: "get_weather", parameters: weather } };

const ofOpenai = {
  async models() {
    const ids = [];
    for await (const card of client.models.list()) ids.push(card.id);
    assert.ok(ids.includes(model));
  },
  async chat() {
    const answer = await ask();
    assert.match(answer.choices[0].message.content, /Paris/);
  },
  async streaming() {
    let text = "";
    for await (const chunk of await ask({ stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, (await ask()).choices[0].message.content);
  },
  async "JSON schema"() {
    const json_schema = { name: "person", strict: true, schema: person };
    const answer = await ask({ response_format: { type: "json_schema", json_schema } });
    assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)).sort(), ["age", "name"]);
  },
  async tools() {
    const answer = await ask({ tools: [weatherTool], tool_choice: "required" });
    const call = answer.choices[0].message.tool_calls[0];
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["city", "unit"]);
  },
  async "tools, streaming"() {
    const stream = client.chat.completions.stream({
      model, messages: question, ...greedy, tools: [weatherTool], tool_choice: "required",
    });
    const answer = await stream.finalChatCompletion();
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments);
  },
  async completions() {
    const answer = await client.completions.create({ model, prompt: "The capital of France is", ...greedy });
    assert.match(answer.choices[0].text, /Paris/);
  },
  async embeddings() {
    const answer = await client.embeddings.create({ model: embedder, input: ["a cat"] });
    assert.equal(answer.data[0].embedding.length, 384);
  },
  async errors() {
    await assert.rejects(
      client.chat.completions.create({ model: "nobody", messages: question }),
      (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
    );
  },
};

const lmx = createOpenAICompatible({
  name: "lmx", baseURL: url, apiKey: "not-needed", includeUsage: true, supportsStructuredOutputs: true,
});
const common = { model: lmx(model), temperature: 0, maxOutputTokens: 60, maxRetries: 0 };
const prompt = question[0].content;
const tools = { get_weather: tool({ description: "Weather of a city", inputSchema: jsonSchema(weather) }) };

const ofAi = {
  async chat() {
    const { text, usage } = await generateText({ ...common, prompt });
    assert.match(text, /Paris/);
    assert.ok(usage.outputTokens > 0);
  },
  async streaming() {
    let text = "";
    for await (const piece of streamText({ ...common, prompt }).textStream) text += piece;
    assert.equal(text, (await generateText({ ...common, prompt })).text);
  },
  async "JSON schema"() {
    const output = Output.object({ schema: jsonSchema(person) });
    const answer = await generateText({ ...common, prompt: "Invent a person.", output });
    assert.deepEqual(Object.keys(answer.output).sort(), ["age", "name"]);
  },
  async tools() {
    const answer = await generateText({ ...common, prompt, tools, toolChoice: "required" });
    assert.equal(answer.toolCalls[0].toolName, "get_weather");
    assert.deepEqual(Object.keys(answer.toolCalls[0].input).sort(), ["city", "unit"]);
  },
  async "tools, streaming"() {
    const calls = await streamText({ ...common, prompt, tools, toolChoice: "required" }).toolCalls;
    assert.deepEqual(Object.keys(calls[0].input).sort(), ["city", "unit"]);
  },
  async embeddings() {
    const { embeddings } = await embedMany({ model: lmx.embeddingModel(embedder), values: ["a cat", "a dog"] });
    assert.deepEqual(embeddings.map((vector) => vector.length), [384, 384]);
  },
};

for (const [feature, attempt] of Object.entries(process.argv[2] === "ai" ? ofAi : ofOpenai)) {
  try {
    await attempt();
    console.log(JSON.stringify({ feature, ok: true, detail: "" }));
  } catch (error) {
    console.log(JSON.stringify({ feature, ok: false, detail: String(error?.stack ?? error).slice(0, 1500) }));
  }
}
