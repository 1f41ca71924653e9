// The chat: what is typed becomes tokens, goes to the engine, and comes back as text.

const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const asked = new URLSearchParams(location.hash.slice(1)); // engine=wasm, temperature=0, tokens=64

// ---- files: in the page itself, or beside it -----------------------------------------------------------

const within = (name) => $(`file:${name}`);

async function bytes(name) {
  const held = within(name);
  if (!held) return new Uint8Array(await (await fetch(name)).arrayBuffer());
  const text = atob(held.textContent), packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  held.remove();
  if (held.dataset.packed !== "gzip") return packed;
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const json = async (name) => JSON.parse(new TextDecoder().decode(await bytes(name)));

async function link(name) {
  if (!within(name)) return new URL(name, location.href).href;
  return URL.createObjectURL(new Blob([await bytes(name)], { type: "text/javascript" }));
}

// ---- text and tokens -----------------------------------------------------------------------------------

// A model without a tokenizer is talked to in numbers.
const numbers = {
  encode: (text) => ({ ids: (text.match(/\d+/g) ?? []).map(Number) }),
  decode: (ids) => ids.join(" "),
};

async function codec(page) {
  if (!page.tokenizer) return { ...numbers, prompt: (turns) => numbers.encode(turns.map((turn) => turn.content).join(" ")).ids };
  const { Tokenizer } = await import(await link("tokenizers.min.mjs"));
  const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
  const plain = (text) => Array.from(tokenizer.encode(text, { add_special_tokens: false }).ids);
  const decode = (ids) => (ids.length ? tokenizer.decode(ids, { skip_special_tokens: true }) : "");
  if (!page.template) {
    return { decode, prompt: (turns) => [...page.begin, ...plain(turns.map((turn) => turn.content).join(""))] };
  }
  const { Template } = await import(await link("jinja.js"));
  const template = new Template(page.template);
  const prompt = (turns) => plain(template.render({ messages: turns, add_generation_prompt: true, ...page.special }));
  return { decode, prompt };
}

// ---- what is shown -------------------------------------------------------------------------------------

function bubble(role) {
  const article = document.createElement("article");
  article.className = role;
  $("log").append(article);
  $("welcome").hidden = true;
  return article;
}

// Text with ``` fences as code; never as HTML.
function show(article, text) {
  article.replaceChildren(...text.split(/```\w*\n?/).map((part, i) => {
    const element = document.createElement(i % 2 ? "pre" : "p");
    element.textContent = i % 2 ? part : part.trim();
    return element;
  }).filter((element) => element.textContent));
  const low = $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 120;
  if (low) $("scroll").scrollTop = $("scroll").scrollHeight;
}

function status(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

// working: nothing can be sent, but what goes on can be stopped
function mode(name) {
  root.dataset.mode = name;
  $("send").hidden = name === "working";
  $("stop").hidden = name !== "working";
  $("send").disabled = name !== "ready" || !$("text").value.trim();
}

const many = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(1)} billion` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} million` : `${n}`);
const size = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : `${(n / 1e6).toFixed(1)} MB`);

function card(page, engine, name) {
  const { model, weights } = page.engines[engine];
  const rows = [
    ["Weights", many(page.weights)],
    ["Format", page.format],
    ["Size", size([model, ...weights].reduce((sum, file) => sum + page.files[file], 0))],
    ["Context", page.context ? `${page.context} tokens` : `the newest ${page.window} tokens`],
    ["Runs on", name],
  ];
  for (const list of document.querySelectorAll("dl.card")) {
    list.replaceChildren(...rows.flatMap(([name, value]) => {
      const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
      dt.textContent = name;
      dd.textContent = value;
      return [dt, dd];
    }));
  }
}

// ---- the conversation ----------------------------------------------------------------------------------

const REASONS = {
  end: "",
  length: " · the limit of tokens is reached",
  stopped: " · stopped",
  context: " · the context is full; begin a new chat",
};

function main(page, words, engine) {
  let turns = [], answer = null;

  function send() {
    const text = $("text").value.replace(/\s+$/, "");
    if (root.dataset.mode !== "ready" || !text) return;
    const next = [...turns, { role: "user", content: text }];
    const ids = words.prompt(next);
    if (page.context && ids.length > page.context) {
      status(`${ids.length} tokens do not fit into ${page.context}; begin a new chat`, true);
      return;
    }
    turns = next;
    show(bubble("user"), text);
    answer = bubble("assistant");
    answer.dataset.prompt = ids.join(" ");
    $("text").value = "";
    grow();
    mode("working");
    status("reading…");
    const sampler = { ...page.sampler, temperature: Number($("temperature").value) };
    engine.postMessage({ kind: "generate", ids, limit: Number($("tokens").value), sampler });
  }

  const heard = {
    reading: ({ done, total }) => status(`read ${done} of ${total} tokens`),
    token: ({ ids }) => {
      show(answer, words.decode(ids).replace(/\uFFFD+$/, ""));
      status(`${ids.length} tokens`);
    },
    done: ({ ids, reason, read, reading, speed }) => {
      const text = words.decode(ids);
      show(answer, text || "…");
      answer.dataset.ids = ids.join(" ");
      turns.push({ role: "assistant", content: text });
      const rate = speed ? ` · ${speed.toFixed(1)} tokens/s` : "";
      status(`${ids.length} tokens${rate} · read ${read} at ${reading.toFixed(0)}/s${REASONS[reason]}`);
      mode("ready");
      $("text").focus();
    },
    failed: ({ text }) => {
      status(text, true);
      mode("ready");
    },
  };
  engine.onmessage = ({ data }) => heard[data.kind]?.(data);

  function clear() {
    if (root.dataset.mode !== "ready") return;
    turns = [];
    $("log").replaceChildren();
    $("welcome").hidden = false;
    status("");
    $("text").focus();
  }

  function grow() {
    $("text").style.height = "auto";
    $("text").style.height = `${Math.min($("text").scrollHeight, 200)}px`;
    mode(root.dataset.mode);
  }

  $("form").onsubmit = (event) => { event.preventDefault(); send(); };
  $("text").oninput = grow;
  $("text").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  };
  $("stop").onclick = () => engine.postMessage({ kind: "stop" });
  $("clear").onclick = clear;
  mode("ready");
  grow();
  $("text").focus();
}

async function start() {
  const page = await json("page.json");
  document.title = page.name;
  $("name").textContent = $("title").textContent = page.name;
  $("temperature").value = asked.get("temperature") ?? page.sampler.temperature ?? 0.7;
  $("tokens").value = asked.get("tokens") ?? Math.min(512, page.context ?? 512);
  for (const input of document.querySelectorAll("#settings input")) {
    const shown = input.nextElementSibling;
    (input.oninput = () => { shown.textContent = input.value; })();
  }
  $("open").onclick = () => $("about").showModal();
  $("about").onclick = (event) => { if (event.target === $("about")) $("about").close(); };
  card(page, "webgpu", "…");
  const words = await codec(page);
  const files = {};
  for (const name of page.inline) files[name] = await bytes(name);
  const engine = new Worker(await link("engine.js"));
  const base = new URL(".", location.href).href;
  await new Promise((ready, failed) => {
    engine.onerror = (event) => failed(new Error(event.message ?? "the engine did not start"));
    engine.onmessage = ({ data }) => {
      if (data.kind === "progress") {
        $("bar").value = data.done / data.total;
        status(`loading ${size(data.done)} of ${size(data.total)}`);
      }
      if (data.kind === "failed") failed(new Error(data.text));
      if (data.kind === "ready") {
        const name = data.engine === "webgpu" ? "WebGPU" : `WebAssembly, ${data.threads === 1 ? "1 thread" : `${data.threads} threads`}`;
        $("engine").textContent = data.engine === "webgpu" ? "WebGPU" : "WebAssembly";
        root.dataset.engine = data.engine;
        card(page, data.engine, name);
        status(data.problems.join("; "));
        ready();
      }
    };
    engine.postMessage({ kind: "open", page, files, base, engine: asked.get("engine") });
  });
  $("bar").hidden = true;
  main(page, words, engine);
}

mode("loading");
start().catch((error) => {
  root.dataset.mode = "failed";
  $("bar").hidden = true;
  status(`The model cannot be opened: ${error.message ?? error}`, true);
});
