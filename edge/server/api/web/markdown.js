// A model's Markdown as elements, while it grows. Nothing of it is ever read as HTML: elements are made by their
// kind, and texts are set as texts. So nothing of it runs, and nothing is fetched.

import hljs from "./libraries/highlight.js";
import { Marked } from "./libraries/marked.js";
import { t } from "./texts.js";

// Characters of a paragraph that are still searched for marks: that takes time in the square of its length.
const LONG = 4000;
const TAGS = { blockquote: "blockquote", del: "del", em: "em", paragraph: "p", strong: "strong" };
const NAMED = { amp: "&", apos: "'", copy: "©", gt: ">", hellip: "…", lt: "<", mdash: "—", nbsp: "\u00a0", ndash: "–", quot: '"' };
const marked = new Marked({ gfm: true, breaks: true });

marked.use({
  tokenizer: {
    html: () => undefined,
    tag: () => undefined,
    paragraph(source) {
      const [raw] = this.rules.block.paragraph.exec(source) ?? [""];
      return raw.length > LONG && { type: "paragraph", raw, text: raw, tokens: [{ type: "text", raw, text: raw }] };
    },
  },
  extensions: [{
    // CommonMark takes no ** between punctuation and a letter; Chinese has no space there.
    name: "strong",
    level: "inline",
    tokenizer(source) {
      const found = /^\*\*(?![\s*])((?:[^*`]|\*(?!\*)){1,500}?)(?<!\s)\*\*(?!\*)/.exec(source);
      if (!found) return undefined;
      return { type: "strong", raw: found[0], text: found[1], tokens: this.lexer.inlineTokens(found[1]) };
    },
  }],
});

function element(kind, children = [], properties = {}) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

const unescaped = (text) => text.replace(/&(?:#(\d{1,6})|#x([\da-f]{1,5})|([a-z]+));/gi, (all, decimal, hex, name) => {
  if (name) return NAMED[name] ?? all;
  const code = decimal ? Number(decimal) : parseInt(hex, 16);
  return code && code <= 0x10ffff ? String.fromCodePoint(code) : all;
});

function link(href, children) {
  const address = unescaped(href);
  if (!/^(?:https?|mailto):/i.test(address)) return element("span", children);
  return element("a", children, { href: address, target: "_blank", rel: "noopener noreferrer" });
}

function highlighted(text, language) {
  const open = [document.createDocumentFragment()];
  const html = hljs.getLanguage(language) && hljs.highlight(text, { language, ignoreIllegals: true }).value;
  // Of highlight.js come escaped text, <span class="..."> and </span>.
  for (const part of html ? html.split(/(<[^>]*>)/) : []) {
    if (part === "</span>") open.pop();
    else if (part.startsWith("<")) {
      const span = element("span", [], { className: part.slice('<span class="'.length, -2) });
      open.at(-1).append(span);
      open.push(span);
    } else open.at(-1).append(unescaped(part));
  }
  if (!html) open[0].append(text);
  return open[0];
}

const languageOf = (token) => (token.lang ?? "").split(/\s/)[0];

function codeBox(token) {
  const copy = element("button", [t("Copy")], { type: "button", className: "copy" });
  const code = element("code", [highlighted(token.text, languageOf(token)), "\n"]);
  return element("div", [element("div", [languageOf(token), copy]), element("pre", [code])], { className: "code" });
}

function table({ header, rows }) {
  const row = (cells, kind) => element("tr", cells.map((cell) => element(kind, nodes(cell.tokens), { align: cell.align ?? "" })));
  const body = element("tbody", rows.map((cells) => row(cells, "td")));
  return element("table", [element("thead", [row(header, "th")]), body]);
}

/** What a token of marked's is on the page. */
function node(token) {
  const inner = () => (token.tokens ? nodes(token.tokens) : [token.text]);
  switch (token.type) {
    case "space":
    case "def": return "";
    case "br":
    case "hr": return element(token.type);
    case "checkbox": return element("input", [], { type: "checkbox", checked: token.checked, disabled: true });
    case "code": return codeBox(token);
    case "codespan": return element("code", [token.text]);
    case "heading": return element(`h${token.depth}`, inner());
    case "image":
      // An image of another host would tell that host what a model wrote into its address.
      if (!/^data:image\//i.test(token.href)) return link(token.href, [token.text || token.href]);
      return element("img", [], { src: token.href, alt: token.text });
    case "link": return link(token.href, inner());
    case "list": {
      const items = token.items.map((item) => element("li", nodes(item.tokens)));
      return token.ordered ? element("ol", items, { start: token.start }) : element("ul", items);
    }
    case "table": return table(token);
    case "escape": return token.text;
    default:
      if (TAGS[token.type]) return element(TAGS[token.type], inner());
      if (!token.tokens) return unescaped(token.text);
      return nodes(token.tokens).reduce((all, one) => (all.append(one), all), document.createDocumentFragment());
  }
}

const nodes = (tokens) => tokens.map(node);

/** A code block that grows: coloured anew each time it is a quarter longer, so that its length costs once. */
class Code {
  constructor(box, token) {
    this.language = languageOf(token);
    this.text = token.text;
    this.code = box.querySelector("code");
    this.rest = this.code.lastChild;
  }

  grow(text) {
    if (!text.startsWith(this.text) || text.length > 40 + 1.25 * this.text.length) {
      this.text = text;
      this.code.replaceChildren(highlighted(text, this.language), this.rest);
    }
    this.rest.data = text.slice(this.text.length) + "\n";
  }
}

/** Shows one text in `box`. Blocks that are complete are made once; only the last is made anew as it grows. */
export class Markdown {
  constructor(box) {
    this.box = box;
    this.reset();
  }

  reset() {
    this.settled = this.fixed = 0; // characters, and nodes
    this.code = null;
    this.box.replaceChildren();
  }

  /** Show `source`, which begins with what was shown before. whole: nothing follows. */
  paint(source, whole) {
    const text = source.replace(/\r\n?/g, "\n");
    // At the end all is read at once: a definition of a link counts for what stands before it.
    if (whole) this.reset();
    try {
      this.grow(text);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      this.reset(); // nested deeper than the stack: shown as it is
      this.box.append(text);
    }
  }

  grow(text) {
    let tokens = marked.lexer(text.slice(this.settled));
    const last = tokens.findLastIndex((token) => token.type !== "space");
    const size = (some) => some.reduce((sum, token) => sum + token.raw.length, 0);
    // Before a whole line of another block nothing changes any more.
    if (last > 0 && tokens[last].raw.includes("\n") && size(tokens) === text.length - this.settled) {
      this.replace(tokens.slice(0, last));
      this.settled += size(tokens.slice(0, last));
      this.fixed = this.box.childNodes.length;
      this.code = null;
      tokens = tokens.slice(last);
    }
    const code = tokens[0]?.type === "code" && tokens.length === 1 ? tokens[0] : null;
    if (code && this.code && this.code.language === languageOf(code)) this.code.grow(code.text);
    else {
      this.replace(tokens);
      this.code = code && new Code(this.box.lastElementChild, code);
    }
  }

  replace(tokens) {
    while (this.box.childNodes.length > this.fixed) this.box.lastChild.remove();
    this.box.append(...nodes(tokens));
  }
}
