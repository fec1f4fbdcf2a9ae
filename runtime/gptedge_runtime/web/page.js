// The page: what is typed goes to the worker, what the worker writes is shown.

const element = (id) => document.getElementById(id);
const [form, prompt, count, writeButton, stopButton, status, progress] = [
  "form", "prompt", "count", "write", "stop", "status", "progress",
].map(element);

const REASONS = { eos: "the model ended the text", length: "done", stopped: "stopped" };

// A function that returns a 128-bit vector: browsers without WebAssembly SIMD refuse it.
const SIMD = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11]);

let worker = null;
let running = false;

function start() {
  const missing = missingFeature();
  if (missing) return fail(`${missing}. Use a current Firefox, Chrome, Edge or Safari.`);
  worker = new Worker("worker.js", { type: "module" });
  worker.addEventListener("message", ({ data }) => handlers[data.type](data));
  worker.addEventListener("error", () => fail("The model's thread cannot start. Reload the page."));
  worker.postMessage({ type: "load" });
}

function missingFeature() {
  if (typeof WebAssembly !== "object") return "This browser has no WebAssembly, which the model runs on";
  if (!WebAssembly.validate(SIMD)) return "This browser's WebAssembly has no SIMD, which the model needs";
  return null;
}

const handlers = {
  progress({ loaded, total }) {
    progress.value = loaded / total;
    status.textContent = `Loading the weights: ${megabytes(loaded)} of ${megabytes(total)}`;
  },
  ready({ config, precision, bytes, isolated }) {
    progress.hidden = true;
    writeButton.disabled = false;
    const threads = isolated ? "" : " · one thread, since this server does not isolate the page";
    element("model").textContent =
      `${config.n_layers} layers · width ${config.emb_dim} · context ${config.context_length.toLocaleString("en")} · ` +
      `${precision} · ${megabytes(bytes)} · runs in this tab, nothing you write leaves it${threads}`;
    status.textContent = "Ready.";
  },
  token(token) {
    element("continuation").append(token.text);
    appendToken(token);
    if (token.made > 1) status.textContent = `${speed(token)} · writing …`;
  },
  done(result) {
    element("continuation").append(result.text);
    status.textContent = `${speed(result)} · ${REASONS[result.reason]}`;
    setRunning(false);
  },
  error({ message }) {
    if (!running) return fail(`The bundle cannot be opened: ${message}.`);
    status.textContent = `${message}.`;
    setRunning(false);
  },
};

function fail(message) {
  progress.hidden = true;
  status.classList.add("failed");
  status.textContent = message;
}

function write(event) {
  event.preventDefault();
  if (running || writeButton.disabled || !form.reportValidity()) return;
  element("given").textContent = prompt.value;
  element("continuation").textContent = "";
  element("tokens").replaceChildren();
  setRunning(true);
  status.textContent = "Reading the text …";
  worker.postMessage({ type: "write", prompt: prompt.value, count: count.valueAsNumber });
}

function stop() {
  if (running) worker.postMessage({ type: "stop" });
}

function setRunning(value) {
  running = value;
  writeButton.disabled = value;
  stopButton.disabled = !value;
}

function appendToken({ id, bytes, probability }) {
  const row = document.createElement("li");
  row.dataset.id = id;
  row.title = `token ${id}`;
  row.style.setProperty("--share", probability); // the length of the bar
  const [token, bar, percent] = ["code", "i", "span"].map((tag) => row.appendChild(document.createElement(tag)));
  token.textContent = visible(bytes);
  bar.ariaHidden = "true"; // the number beside it says the same
  percent.textContent = `${(100 * probability).toFixed(probability < 0.1 ? 1 : 0)} %`;
  const list = element("tokens");
  const follow = list.scrollTop + list.clientHeight > list.scrollHeight - 40; // unless the reader has scrolled up
  list.append(row);
  if (follow) list.scrollTop = list.scrollHeight;
}

// A token on its own: spaces and line ends as signs, a part of a character as its bytes.
function visible(bytes) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  } catch {
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  }
}

function speed({ made, prefillMs, decodeMs }) {
  const rate = decodeMs ? ` · ${Math.round((1000 * (made - 1)) / decodeMs)} tokens/s` : "";
  return `${made} ${made === 1 ? "token" : "tokens"}${rate} · first after ${Math.round(prefillMs)} ms`;
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

form.addEventListener("submit", write);
stopButton.addEventListener("click", stop);
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write(event);
  if (event.key === "Escape") stop();
});

start();
