// Continue a text or chat, and what it costs. Talks to this server alone, by the interface that
// every client uses.
"use strict";

const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

let model = null; // the entry of /v1/models
let key = sessionStorage.getItem("key") || "";
let writing = null; // the AbortController of the request that runs
let mode = "text";

// One conversation or text. `seen` is what the session on the server has read and written; with it
// a request sends only what is new.
const empty = () => ({ session: null, seen: "", tokens: 0, messages: [] });
const state = { text: empty(), chat: empty() };

// ---------------------------------------------------------------- requests

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) at("key-form").hidden = false;
  const body = await answer.json().catch(() => null);
  throw new Error(body?.error?.message || `the server answered ${answer.status}`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function newSession() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return `page-${Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("")}`;
}

function forget(one) {
  if (!one.session) return;
  const path = `v1/sessions/${one.session}`;
  call(path, { method: "DELETE", keepalive: true }).catch(() => {});
  one.session = null;
}

function settings() {
  const value = (id) => at(id).valueAsNumber;
  const asked = {
    model: model.id,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: Math.min(value("max-tokens") || 200, model.max_tokens),
    temperature: Number.isNaN(value("temperature")) ? 0.8 : value("temperature"),
    top_p: value("top-p") || 1,
  };
  if (!Number.isNaN(value("seed"))) asked.seed = value("seed");
  return asked;
}

// Send a request, pass on its pieces, and count.
async function write(path, body, one, show) {
  const before = one.tokens;
  let pieces = 0;
  let first = 0;
  writing = new AbortController();
  busy(true);
  notice("");
  try {
    const options = { method: "POST", body: JSON.stringify(body), signal: writing.signal };
    for await (const event of events(await call(path, options))) {
      const choice = event.choices[0];
      const piece = choice?.text ?? choice?.delta?.content ?? "";
      if (piece) {
        first ||= performance.now();
        pieces += 1;
        show(piece);
        // Pieces are about tokens; the numbers that count come at the end.
        figures(one, pieces, performance.now() - first);
      }
      if (event.usage) {
        const own = event.usage.prompt_tokens + event.usage.completion_tokens;
        one.tokens = one.session ? before + own : own;
        figures(one, 0, performance.now() - first, event.usage.completion_tokens);
      }
    }
  } catch (error) {
    one.tokens += pieces;
    if (error.name !== "AbortError") {
      notice(error.message);
      one.session = null; // what it has read is not known here
      one.seen = "";
    }
  } finally {
    writing = null;
    busy(false);
  }
}

async function continueText() {
  const one = state.text;
  const box = at("text");
  const whole = box.value;
  if (model.sessions && (!one.session || !whole.startsWith(one.seen))) {
    forget(one);
    Object.assign(one, empty(), { session: newSession() });
  }
  const body = settings();
  if (one.session) body.session_id = one.session;
  body.prompt = one.session ? whole.slice(one.seen.length) : whole;
  one.seen = whole;
  await write("v1/completions", body, one, (piece) => {
    const follow = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    box.value += piece;
    one.seen = box.value;
    if (follow) box.scrollTop = box.scrollHeight;
  });
}

function bubble(role, text) {
  const item = document.createElement("li");
  item.dataset.role = role;
  item.textContent = text;
  at("messages").append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

async function sendMessage() {
  const one = state.chat;
  const content = at("message").value.trim();
  if (!content) return at("message").focus();
  at("message").value = "";
  const message = { role: "user", content };
  bubble("user", content);
  const body = settings();
  if (model.sessions && !one.session) {
    // A new session, or one that was lost: it reads all messages.
    one.session = newSession();
    body.messages = [...one.messages, message];
  } else {
    body.messages = one.session ? [message] : [...one.messages, message];
  }
  if (one.session) body.session_id = one.session;
  const answer = bubble("assistant", "");
  await write("v1/chat/completions", body, one, (piece) => {
    answer.textContent += piece;
    answer.scrollIntoView({ block: "nearest" });
  });
  one.messages.push(message, { role: "assistant", content: answer.textContent });
  return at("message").focus();
}

// ---------------------------------------------------------------- what is shown

function bytes(count) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; count >= 1000 && unit < units.length - 1; unit += 1) count /= 1000;
  return `${unit ? count.toPrecision(3) : number.format(count)} ${units[unit]}`;
}

function figures(one, running = 0, milliseconds = 0, made = running) {
  const tokens = one.tokens + running;
  const size = (part) => part.bytes + part.bytes_per_token * tokens;
  const [own, other] = [size(model.state), size(model.transformer_state)];
  at("tokens").textContent = number.format(tokens);
  at("state").textContent = tokens ? bytes(own) : "–";
  at("cache").textContent = tokens ? bytes(other) : "–";
  const most = Math.max(own, other);
  at("state-bar").style.width = `${tokens ? (100 * own) / most : 0}%`;
  at("cache-bar").style.width = `${tokens ? (100 * other) / most : 0}%`;
  if (made > 1 && milliseconds > 0) {
    at("speed").textContent = number.format(Math.round(((made - 1) / milliseconds) * 1000));
  }
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function busy(now) {
  at("go").disabled = at("anew").disabled = now;
  at("stop").disabled = !now;
  at("text").readOnly = now;
}

function choose(next) {
  if (writing) return;
  mode = next;
  at("text-part").hidden = mode !== "text";
  at("chat-part").hidden = mode !== "chat";
  at("to-text").setAttribute("aria-pressed", String(mode === "text"));
  at("to-chat").setAttribute("aria-pressed", String(mode === "chat"));
  at("go").textContent = mode === "text" ? "Continue" : "Send";
  at("speed").textContent = "–";
  figures(state[mode]);
}

function anew() {
  forget(state[mode]);
  state[mode] = empty();
  if (mode === "text") at("text").value = "";
  else at("messages").replaceChildren();
  notice("");
  choose(mode);
  at(mode === "text" ? "text" : "message").focus();
}

function go() {
  if (!writing && model) (mode === "text" ? continueText : sendMessage)();
}

async function begin() {
  try {
    model = (await (await call("v1/models")).json()).data[0];
  } catch (error) {
    notice(error.message);
    return;
  }
  notice("");
  at("key-form").hidden = true;
  at("name").textContent = model.id;
  document.title = model.id;
  at("modes").hidden = !model.chat;
  at("max-tokens").max = model.max_tokens;
  choose(model.chat ? "chat" : "text");
}

at("go").addEventListener("click", go);
at("stop").addEventListener("click", () => writing?.abort());
at("anew").addEventListener("click", anew);
at("to-text").addEventListener("click", () => choose("text"));
at("to-chat").addEventListener("click", () => choose("chat"));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  sessionStorage.setItem("key", key);
  begin();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go();
  if (event.key === "Escape") writing?.abort();
});
window.addEventListener("pagehide", () => [state.text, state.chat].forEach(forget));
begin();
