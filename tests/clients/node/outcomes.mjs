// What both programs share, as outcomes.py has it.

export const [baseURL, model] = process.argv.slice(2);
export const city = "Name a city and how many people live in it, as JSON.";
export const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};

export function assert(condition, what) {
  if (!condition) throw new Error(what);
}

export async function check(name, carryOut) {
  let told = { check: name };
  try {
    await carryOut();
  } catch (error) {
    const text = `${error.name}: ${error.message} ${error.cause?.message ?? ""}`;
    told = { check: name, error: text.replace(/\s+/g, " ").slice(0, 400) };
  }
  console.log(JSON.stringify(told));
}
