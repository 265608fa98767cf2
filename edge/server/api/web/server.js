// The server, asked as any other client asks it.

import { t } from "./texts.js";

// Ends of a stream after which the same question may be asked again.
const PASSING = new Set(["engine_crashed", "shutting_down"]);
// A question that ends the engine's process each time must not do so for ever.
const TORN_AT_MOST = 1;

/** Why there is no answer. wait: seconds after which to ask again, 0: it would be refused again. */
class Refusal extends Error {
  constructor(message, wait = 0, torn = false) {
    super(message);
    Object.assign(this, { wait, torn });
  }
}

// Without a name and password that the page's own address may have: fetch refuses those.
function at(path) {
  const url = new URL(path, document.baseURI);
  url.username = url.password = url.hash = "";
  return url;
}

export const health = async () => (await fetch(at("health"))).json();

const sleep = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});

async function ready(model, seconds, signal) {
  for (await sleep(seconds, signal); ; await sleep(0.5, signal)) {
    const { models, model: usual } = await health().catch(() => ({}));
    if (models && !["waiting", "loading", "stalled"].includes(models[model ?? usual])) return;
  }
}

async function* events(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  for (let held = ""; ;) {
    const { done, value } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new Refusal(t("The connection broke."), 1, true);
    });
    if (done) throw new Refusal(t("The connection broke."), 1, true);
    held += decoder.decode(value, { stream: true });
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      if (block === "data: [DONE]") return;
      if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
    }
  }
}

async function* asked(body, signal) {
  const response = await fetch(at("v1/chat/completions"), {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  }).catch((error) => { throw signal.aborted ? error : new Refusal(t("The server does not answer."), 1); });
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    const wait = Number(response.headers.get("retry-after")) || Number(PASSING.has(error?.code));
    const message = error?.message || `${response.status} ${response.statusText}`;
    throw new Refusal(message, wait, error?.code === "engine_crashed");
  }
  for await (const event of events(response.body, signal)) {
    if (event.error) throw new Refusal(event.error.message, Number(PASSING.has(event.error.code)), true);
    yield event;
  }
}

/** The events of an answer. Where the server cannot answer now, `waiting(error)` is called, and it is asked again. */
export async function* answered(body, signal, waiting) {
  for (let torn = 0; ;) {
    try {
      return yield* asked(body, signal);
    } catch (error) {
      torn += Boolean(error.torn);
      if (!error.wait || torn > TORN_AT_MOST) throw error;
      waiting(error);
      await ready(body.model, error.wait, signal);
    }
  }
}
