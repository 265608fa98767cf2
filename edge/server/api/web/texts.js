// The page's words, in English and Chinese. The English text is the key; edge/ui/texts.py has the same words.

const CHINESE = {
  "Answer": "回答",
  "Ask again": "重新提问",
  "Cancel": "取消",
  "Conversations": "对话列表",
  "Copied": "已复制",
  "Copy": "复制",
  "Delete": "删除",
  "Delete {name}?": "删除“{name}”？",
  "Edit": "编辑",
  "Enter sends, Shift+Enter makes a line, Esc stops.": "Enter 发送，Shift+Enter 换行，Esc 停止。",
  "Light or dark": "浅色或深色",
  "Model": "模型",
  "New chat": "新对话",
  "Next answer": "下一个回答",
  "Previous answer": "上一个回答",
  "Question": "问题",
  "Reasoning": "思考过程",
  "Regenerate": "重新生成",
  "Rename": "重命名",
  "Save as JSON": "存为 JSON",
  "Send": "发送",
  "Stop": "停止",
  "Stopped": "已停止",
  "System prompt": "系统提示词",
  "System prompt and sampling": "系统提示词与采样",
  "Temperature": "温度",
  "The browser does not keep this conversation: {reason}": "浏览器无法保存此对话：{reason}",
  "The connection broke.": "连接中断。",
  "The server does not answer.": "服务器没有应答。",
  "Thinking …": "思考中……",
  "Tokens at most": "最多词元数",
  "What you write stays on the machine that serves this page, and in this browser.":
    "你写的内容只留在提供本页的机器和这个浏览器里。",
  "as trained": "按训练时",
  "cut at the limit": "到达长度上限",
  "off": "关",
  "on": "开",
  "{reason}: asked again as soon as it is ready": "{reason}：就绪后会自动重新提问",
  "{tokens} tokens, {rate} tokens/s, first after {seconds} s":
    "{tokens} 个词元，{rate} 词元/秒，首个用时 {seconds} 秒",
};

// Storage may be forbidden; the page works without.
export const keep = (name, value) => { try { localStorage.setItem("edge." + name, value); } catch {} };
export const kept = (name) => { try { return localStorage.getItem("edge." + name); } catch { return null; } };

let language = kept("language") || ((navigator.language || "").startsWith("zh") ? "zh" : "en");

/** The text in the page's language, its {names} filled in. */
export function t(text, values = {}) {
  const known = language === "zh" ? CHINESE[text] : text;
  return known.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Write the texts of a part of the page. */
export function speak(part = document) {
  for (const one of part.querySelectorAll("[data-text]")) one.textContent = t(one.dataset.text);
  for (const one of part.querySelectorAll("[data-placeholder]")) one.placeholder = t(one.dataset.placeholder);
  for (const one of part.querySelectorAll("[data-label]")) one.ariaLabel = one.title = t(one.dataset.label);
}

/** Write the whole page in its language, or in the other one from now on. */
export function translate(other = false) {
  if (other) keep("language", language = language === "zh" ? "en" : "zh");
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.getElementById("language").textContent = language === "zh" ? "English" : "中文";
  speak();
}
