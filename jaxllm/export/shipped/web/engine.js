// The model, in a worker of its own: a session of ONNX Runtime, its state, and the drawing of tokens.
// Messages in: open, generate, stop. Messages out: progress, ready, reading, token, done, failed.

let page, ort, session, state, seen, stopped, broken;

const say = (kind, more = {}) => postMessage({ kind, ...more });
const actions = { open, generate, stop: () => { stopped = true; } };

onmessage = async ({ data }) => {
  try {
    await actions[data.kind](data);
  } catch (error) {
    broken = true; // whatever the state holds now
    say("failed", { text: error?.message ?? String(error) });
  }
};

// ---- the session ---------------------------------------------------------------------------------------

async function open(asked) {
  page = asked.page;
  const problems = [];
  for (const engine of await engines(asked.engine)) {
    try {
      await begin(engine, asked);
      reset();
      return say("ready", { engine, threads: ort.env.wasm.numThreads, problems });
    } catch (error) {
      problems.push(`${engine}: ${error?.message ?? error}`);
    }
  }
  throw new Error(problems.join("; "));
}

// A GPU in software is slower than WebAssembly.
async function engines(asked) {
  if (asked) return [asked];
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const software = adapter?.info?.isFallbackAdapter || /swiftshader|llvmpipe/.test(adapter?.info?.architecture ?? "");
  return adapter && !software ? ["webgpu", "wasm"] : ["wasm"];
}

async function begin(engine, { files, base }) {
  const { runtime, wasm, model, weights } = page.engines[engine];
  const read = reader(files, base, [model, ...weights]);
  const link = (name) => (files[name] ? URL.createObjectURL(new Blob([files[name]], { type: "text/javascript" })) : base + name);
  ort = await import(link(runtime));
  if (files[wasm]) ort.env.wasm.wasmBinary = files[wasm];
  else ort.env.wasm.wasmPaths = { wasm: base + wasm };
  // More threads than cores that do arithmetic make it slower; without the headers for sharing there is one.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.max(1, Math.min(8, navigator.hardwareConcurrency >> 1)) : 1;
  const graph = await read(model);
  const externalData = [];
  for (const path of weights) externalData.push({ path, data: await read(path) });
  const arrays = page.state.filter((port) => port.dtype === "float32").map((port) => page.prefix + port.name);
  session = await ort.InferenceSession.create(graph, {
    executionProviders: [engine],
    externalData,
    ...(engine === "webgpu" && { preferredOutputLocation: Object.fromEntries(arrays.map((n) => [n, "gpu-buffer"])) }),
  });
}

// name -> its bytes: from the page itself, or fetched, with what has come of all of them told.
function reader(files, base, names) {
  const total = names.reduce((sum, name) => sum + page.files[name], 0);
  let done = 0;
  return async (name) => {
    if (files[name]) return files[name];
    const response = await fetch(base + name);
    if (!response.ok) throw new Error(`${name} cannot be read (${response.status})`);
    const bytes = new Uint8Array(page.files[name]);
    let at = 0;
    for (const stream = response.body.getReader(); ; ) {
      const { done: end, value } = await stream.read();
      if (end) break;
      bytes.set(value, at);
      at += value.length;
      done += value.length;
      say("progress", { done, total });
    }
    if (at !== bytes.length) throw new Error(`${name} has ${at} bytes instead of ${bytes.length}`);
    return bytes;
  };
}

// ---- the state -----------------------------------------------------------------------------------------

const ARRAYS = { float32: Float32Array, int32: Int32Array };

function reset() {
  for (const tensor of Object.values(state ?? {})) tensor.dispose();
  seen = [];
  state = Object.fromEntries(page.state.map(({ name, shape, dtype, initial }) => {
    const size = shape.reduce((a, b) => a * b, 1);
    return [name, new ort.Tensor(dtype, new ARRAYS[dtype](size).fill(initial), shape)];
  }));
}

// Append tokens -> the logits after the last of them.
async function read(ids) {
  let logits;
  for (let i = 0; i < ids.length && !stopped; i += page.chunk) {
    const part = ids.slice(i, i + page.chunk);
    const tokens = new ort.Tensor("int32", Int32Array.from(part), [1, part.length]);
    const found = await session.run({ tokens, ...state });
    for (const name of Object.keys(state)) {
      state[name].dispose();
      state[name] = found[page.prefix + name];
    }
    seen.push(...part);
    logits = found.logits.data;
    if (ids.length > page.chunk) say("reading", { done: Math.min(i + page.chunk, ids.length), total: ids.length });
    await pause();
  }
  return logits;
}

// Let a message that waits be heard.
const line = new MessageChannel();
const pause = () => new Promise((go) => { line.port1.onmessage = go; line.port2.postMessage(0); });

// ---- tokens --------------------------------------------------------------------------------------------

async function generate({ ids, limit, sampler }) {
  stopped = false;
  const fits = seen.length < ids.length && seen.every((token, i) => token === ids[i]);
  if (!fits || broken) reset();
  broken = false;
  const fresh = ids.slice(seen.length), start = performance.now(), made = [];
  let logits = await read(fresh), reason = "length";
  const middle = performance.now();
  while (made.length < limit && !stopped) {
    const token = draw(logits, sampler);
    if (page.eos.includes(token)) { reason = "end"; break; }
    made.push(token);
    say("token", { ids: made });
    if (page.context && seen.length + 1 > page.context) { reason = "context"; break; }
    if (made.length < limit) logits = await read([token]);
  }
  if (stopped) reason = "stopped";
  const end = performance.now();
  const speed = made.length > 1 ? (made.length - 1) / ((end - middle) / 1000) : 0;
  say("done", { ids: made, reason, read: fresh.length, reading: fresh.length / ((middle - start) / 1000), speed });
}

// A token of these logits. temperature 0: the most probable one; otherwise one of the top_k best (0: of all), of
// those the fewest that have probability top_p together, and none of less than min_p times the best one's.
function draw(logits, { temperature = 1, top_k = 0, top_p = 1, min_p = 0 }) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!(temperature > 0)) return best;
  const least = logits[best] + temperature * Math.log(Math.max(min_p, 1e-9));
  let order = [];
  for (let i = 0; i < logits.length; i++) if (logits[i] >= least) order.push(i);
  order.sort((a, b) => logits[b] - logits[a] || a - b);
  if (top_k > 0) order = order.slice(0, top_k);
  const weights = order.map((i) => Math.exp((logits[i] - logits[best]) / temperature));
  const total = weights.reduce((a, b) => a + b, 0);
  let kept = 0, mass = 0;
  while (kept < order.length && (kept === 0 || mass < top_p * total)) mass += weights[kept++];
  let left = Math.random() * mass;
  for (let i = 0; i < kept; i++) if ((left -= weights[i]) <= 0) return order[i];
  return order[kept - 1];
}
