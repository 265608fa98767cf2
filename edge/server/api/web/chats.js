// The conversations, kept in the browser's own database: nothing of them is sent anywhere but as a request.

const STORE = "chats";
let base = null;

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
const store = (mode) => base.transaction(STORE, mode).objectStore(STORE);

/** Every conversation, the newest first; undefined where the browser forbids to keep any. */
export async function all() {
  try {
    if (!base) {
      const request = indexedDB.open("edge", 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      base = await done(request);
    }
    return (await done(store("readonly").getAll())).sort((a, b) => b.changed - a.changed);
  } catch {
    return undefined;
  }
}

export const keep = async (chat) => { if (base) await done(store("readwrite").put(chat)); };
export const drop = async (chat) => { if (base) await done(store("readwrite").delete(chat.id)); };

/** A conversation without a question. Its keys and those of its turns are those of edge ui's "Save as JSON". */
export function blank({ models = [], system = "", temperature = 0.7, max_tokens = null, thinking = "" } = {}) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", changed: Date.now(), models, system, temperature, max_tokens, thinking, turns: [] };
}

/** The answer of a turn that is shown, and that the conversation goes on from. */
export const chosen = (turn) => turn.answers[turn.chosen];

/** Begin another answer to a turn's question; earlier ones stay. */
export function begin(turn, model) {
  turn.chosen = turn.answers.push({ model, content: "", reasoning: "", note: "", failed: false }) - 1;
  return chosen(turn);
}

/** The body that has a turn answered. Messages are only ever appended, so that the server's prefix cache serves. */
export function request(chat, turn) {
  const messages = chat.system.trim() ? [{ role: "system", content: chat.system.trim() }] : [];
  for (const earlier of chat.turns.slice(0, chat.turns.indexOf(turn))) {
    // Chat templates want turns in pairs: a question without an answer is left out.
    const { content } = chosen(earlier);
    if (content) messages.push({ role: "user", content: earlier.question }, { role: "assistant", content });
  }
  messages.push({ role: "user", content: turn.question });
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  if (chat.models.length) body.model = chat.models[0];
  if (chat.temperature !== null) body.temperature = chat.temperature;
  if (chat.max_tokens !== null) body.max_tokens = chat.max_tokens;
  if (chat.thinking) body.enable_thinking = chat.thinking === "true";
  return body;
}
