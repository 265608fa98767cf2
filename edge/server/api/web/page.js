// The chat page: conversations at the side, one of them shown, its answers as they come.

import * as chats from "./chats.js";
import { Markdown } from "./markdown.js";
import { answered, health } from "./server.js";
import { keep, kept, speak, t, translate } from "./texts.js";

const $ = (id) => document.getElementById(id);
const PAINT_MS = 50;
const SHARE = 1 / 32; // of the time that painting an answer may take
const KEEP_MS = 1000;
const NEAR_END = 80; // pixels

let all = []; // the conversations that have a question
let chat = chats.blank(); // the one that is shown
const runs = new Map(); // by conversation: its answer that is under way, and what stops it
const views = new Map(); // by turn of the conversation that is shown

function make(kind, className, parent, text = "") {
  const one = document.createElement(kind);
  one.className = className;
  one.textContent = text;
  parent.append(one);
  return one;
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // there is none for pages of another machine without TLS
    const area = make("textarea", "only-heard", document.body);
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
    pressed.focus();
  }
  pressed.textContent = t("Copied");
  setTimeout(() => { pressed.textContent = t("Copy"); }, 1500);
}

/** Enter sends; with Shift, or while an input method composes, it belongs to the text. */
function onEnter(area, send) {
  area.addEventListener("keydown", (event) => {
    // Safari ends composing before it tells of the key; 229 is what it then calls it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
}

const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < NEAR_END;
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };

/** A question and its answers, one of them shown. */
class TurnView {
  constructor(turn) {
    this.turn = turn;
    this.box = $("turn").content.firstElementChild.cloneNode(true);
    speak(this.box);
    $("talk").append(this.box);
    this.markdown = new Markdown(this.at(".markdown"));
    this.at(".user > .text").textContent = turn.question;
    const on = (selector, kind, act) => this.at(selector).addEventListener(kind, act);
    on(".user .copy", "click", ({ target }) => copy(turn.question, target));
    on(".edit", "click", () => this.edit(true));
    on(".cancel", "click", () => this.edit(false));
    on("form", "submit", (event) => { event.preventDefault(); this.askAgain(); });
    on("textarea", "keydown", (event) => { if (event.key === "Escape") this.edit(false); });
    onEnter(this.at("textarea"), () => this.askAgain());
    on(".before", "click", () => this.show(turn.chosen - 1));
    on(".after", "click", () => this.show(turn.chosen + 1));
    on(".assistant > .tools .copy", "click", ({ target }) => copy(chats.chosen(turn).content, target));
    on(".again", "click", () => answer(chat, turn));
    this.paint();
  }

  at(selector) {
    return this.box.querySelector(selector);
  }

  edit(open) {
    this.at("form").hidden = !open;
    this.at(".user > .text").hidden = this.at(".user .tools").hidden = open;
    if (!open) return;
    this.at("textarea").value = this.turn.question;
    this.at("textarea").rows = Math.min(12, this.turn.question.split("\n").length + 1);
    this.at("textarea").focus();
  }

  /** Ask the question as it is written now; what came after it is dropped. */
  askAgain() {
    const question = this.at("textarea").value;
    if (!question.trim() || runs.has(chat)) return;
    chat.turns.splice(chat.turns.indexOf(this.turn));
    draw();
    ask(question);
  }

  show(number) {
    this.turn.chosen = number;
    this.markdown.reset();
    this.paint();
    store(chat);
  }

  /** Paint soon; an answer that takes long to paint is painted more seldom. */
  soon() {
    this.timer ??= setTimeout(() => this.box.isConnected && this.paint(), Math.max(PAINT_MS, this.cost / SHARE));
  }

  paint() {
    clearTimeout(this.timer);
    this.timer = undefined;
    const began = performance.now(), follow = atEnd(), { answers, chosen } = this.turn, shown = answers[chosen];
    const busy = runs.get(chat)?.answer === shown;
    this.at("details").hidden = !shown.reasoning;
    this.at("summary").textContent = t(busy && !shown.content ? "Thinking …" : "Reasoning");
    this.at("details .text").textContent = shown.reasoning.trim();
    this.markdown.paint(shown.content, !busy);
    this.at(".markdown").classList.toggle("working", busy && !shown.note);
    this.at(".note").textContent = shown.note;
    this.at(".note").classList.toggle("error", shown.failed);
    this.at(".assistant").ariaBusy = busy;
    this.at(".assistant > .tools .copy").hidden = !shown.content;
    this.at(".versions").hidden = answers.length < 2;
    this.at(".count").textContent = `${chosen + 1}/${answers.length}`;
    this.at(".before").disabled = chosen === 0;
    this.at(".after").disabled = chosen === answers.length - 1;
    if (follow) toEnd();
    this.cost = performance.now() - began;
  }
}

function drawList() {
  $("chats").replaceChildren();
  for (const one of all) {
    const link = make("a", "", make("li", "", $("chats")), one.title);
    link.href = "#" + one.id;
    if (one === chat) link.ariaCurrent = "page";
  }
  $("managed").hidden = !all.includes(chat);
}

function showModel() {
  if ([...$("model").options].some((one) => one.value === chat.models[0])) $("model").value = chat.models[0];
}

function showRun() {
  const busy = runs.has(chat);
  $("talk").classList.toggle("busy", busy);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

function draw() {
  views.clear();
  $("talk").replaceChildren();
  for (const turn of chat.turns) views.set(turn, new TurnView(turn));
  $("empty").hidden = chat.turns.length > 0;
  $("system").value = chat.system;
  $("temperature").value = chat.temperature ?? "";
  $("limit").value = chat.max_tokens ?? "";
  $("thinking").value = chat.thinking;
  showModel();
  drawList();
  showRun();
  toEnd();
}

/** Show the conversation that the address names, or a new one with the settings of the last. */
function open() {
  chat = all.find((one) => "#" + one.id === location.hash) ?? chats.blank(chat);
  draw();
  showSide(false);
  $("ask").focus();
}

/** On a narrow screen the conversations are over the one that is shown. */
function showSide(open) {
  document.body.classList.toggle("menu", open);
  $("menu").ariaExpanded = open;
}

async function store(one) {
  if (!all.includes(one)) return; // deleted, or nothing was asked yet
  one.changed = Date.now();
  try {
    await chats.keep(one);
    $("trouble").hidden = true;
  } catch (error) {
    $("trouble").textContent = t("The browser does not keep this conversation: {reason}", { reason: error.message });
    $("trouble").hidden = false;
  }
}

function rate(tokens, began, first, last) {
  const rate = tokens > 1 ? (1000 * (tokens - 1) / Math.max(last - first, 1)).toFixed(1) : "–";
  const seconds = ((first - began) / 1000).toFixed(2);
  return t("{tokens} tokens, {rate} tokens/s, first after {seconds} s", { tokens, rate, seconds });
}

/** Have a turn of the conversation that is shown answered, whichever is shown meanwhile. */
async function answer(owner, turn) {
  if ($("model").value) owner.models = [$("model").value];
  const run = { stop: new AbortController() };
  let began = performance.now(), first = 0, last = 0, saved = began, reason = "", usage = null;
  const begin = () => {
    run.answer = chats.begin(turn, owner.models[0] ?? "");
    began = performance.now();
    first = 0;
    if (views.has(turn)) views.get(turn).show(turn.chosen);
    else if (owner === chat) views.set(turn, new TurnView(turn));
  };
  const wait = (error) => {
    if (run.answer.content || run.answer.reasoning) {
      // What was torn off stays, as an earlier answer.
      Object.assign(run.answer, { note: error.message, failed: true });
      begin();
    }
    run.answer.note = t("{reason}: asked again as soon as it is ready", { reason: error.message });
    views.get(turn)?.soon();
  };
  const body = chats.request(owner, turn);
  runs.set(owner, run);
  begin();
  showRun();
  store(owner);
  try {
    for await (const event of answered(body, run.stop.signal, wait)) {
      usage = event.usage ?? usage;
      const { delta = {}, finish_reason: ended } = event.choices[0] ?? {};
      reason = ended ?? reason;
      if (!delta.content && !delta.reasoning_content) continue;
      last = performance.now();
      first ||= last;
      run.answer.note = "";
      run.answer.content += delta.content ?? "";
      run.answer.reasoning += delta.reasoning_content ?? "";
      views.get(turn)?.soon();
      if (last - saved > KEEP_MS) {
        saved = last;
        store(owner);
      }
    }
    const cut = reason === "length" ? " · " + t("cut at the limit") : "";
    run.answer.note = (usage ? rate(usage.completion_tokens, began, first, last) : "") + cut;
  } catch (error) {
    run.answer.failed = error.name !== "AbortError";
    run.answer.note = run.answer.failed ? error.message : t("Stopped");
  }
  runs.delete(owner);
  views.get(turn)?.paint();
  showRun();
  store(owner);
}

/** Put a question at the end of the conversation that is shown. */
function ask(question) {
  const turn = { question: question.trim(), answers: [], chosen: 0 };
  if (!turn.question || runs.has(chat)) return false;
  chat.turns.push(turn);
  chat.title ||= turn.question.split("\n")[0].slice(0, 60);
  all = [chat, ...all.filter((one) => one !== chat)];
  history.replaceState(null, "", "#" + chat.id);
  $("empty").hidden = true;
  drawList();
  answer(chat, turn);
  toEnd();
  return true;
}

function send() {
  if (ask($("ask").value)) $("ask").value = "";
}

function stop() {
  runs.get(chat)?.stop.abort();
  $("ask").focus();
}

function fresh() {
  if (location.hash) location.hash = ""; // and so open()
  else open();
}

function save() {
  const link = document.createElement("a");
  const time = new Date(chat.changed).toISOString().slice(0, 19).replace(/[-:]/g, "").replace("T", "-");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(chat, null, 2) + "\n"], { type: "application/json" }));
  link.download = `chat-${time}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

function rename() {
  const title = prompt(t("Rename"), chat.title)?.trim();
  if (!title) return;
  chat.title = title;
  store(chat);
  drawList();
}

function forget() {
  if (!confirm(t("Delete {name}?", { name: chat.title }))) return;
  runs.get(chat)?.stop.abort();
  all = all.filter((one) => one !== chat);
  chats.drop(chat);
  fresh();
}

function set() {
  const number = ({ value }) => (value === "" ? null : Number(value));
  const [temperature, max_tokens] = [$("temperature"), $("limit")].map(number);
  Object.assign(chat, { system: $("system").value, temperature, max_tokens, thinking: $("thinking").value });
  store(chat);
}

function paintTheme(turned = false) {
  const { dataset } = document.documentElement;
  const theme = dataset.theme || kept("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  if (turned) keep("theme", dataset.theme = theme === "dark" ? "light" : "dark");
  else if (kept("theme")) dataset.theme = theme;
}

async function meet() {
  try {
    const { model, models, device } = await health();
    $("about").textContent = device ? `${model} · ${device}` : model;
    for (const name of Object.keys(models)) make("option", "", $("model"), name).value = name;
    $("model").value = model;
    $("model").hidden = Object.keys(models).length < 2;
    showModel();
  } catch (error) {
    $("about").textContent = error.message;
  }
}

function listen() {
  const on = (id, kind, act) => $(id).addEventListener(kind, act);
  on("form", "submit", (event) => { event.preventDefault(); send(); });
  onEnter($("ask"), send);
  on("stop", "click", stop);
  on("fresh", "click", fresh);
  on("rename", "click", rename);
  on("save", "click", save);
  on("delete", "click", forget);
  on("options", "input", set);
  on("language", "click", () => { translate(true); draw(); });
  on("theme", "click", () => paintTheme(true));
  on("menu", "click", () => showSide(!document.body.classList.contains("menu")));
  on("chats", "click", () => showSide(false));
  on("talk", "click", ({ target }) => {
    if (target.matches(".code .copy")) copy(target.closest(".code").querySelector("code").textContent, target);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && runs.has(chat)) stop(); });
  window.addEventListener("hashchange", open);
}

paintTheme();
translate();
all = await chats.all() ?? [];
listen();
open();
meet();
