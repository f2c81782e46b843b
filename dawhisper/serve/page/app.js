// The page: recordings go to /v1/audio/transcriptions as a stream of events, the microphone to the live WebSocket.
const RATE = 16000;
const PER_PEAK = 320; // samples behind one stroke of the waveform: 20 ms
const MAX_DECODED = 200e6; // bytes of a file that the browser is asked to decode for its waveform

const LOST = "the connection to the server was lost; record again";

const $ = (id) => document.getElementById(id);
let busy = false;
let live = null;
let focused = null;
let models = [];

// ------------------------------------------------------------------------------------------------------- messages

function say(text) {
  $("status").textContent = text;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function ask(path, options = {}) {
  const headers = $("key").value ? { Authorization: `Bearer ${$("key").value}` } : {};
  const response = await fetch(path, { ...options, headers }).catch(() => {
    throw new Error("the server can't be reached; is it still running?");
  });
  if (response.ok) return response;
  if (response.status === 401) {
    $("key-label").hidden = false;
    throw new Error($("key").value ? "the server does not take this key" : "this server asks for a key");
  }
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function loadModels() {
  models = (await (await ask("v1/models")).json()).data;
  const named = models.map((m) => new Option(m.dual ? `${m.id} (with gate)` : m.id, m.id));
  $("model").replaceChildren(...named);
  $("compare").replaceChildren(new Option("nothing", ""), ...named.map((o) => o.cloneNode(true)));
  $("compare-label").hidden = models.length < 2;
  fail("");
}

function setBusy(on) {
  busy = on;
  if (on) focused = document.activeElement;
  $("file").disabled = on;
  $("record").disabled = on && !live;
  for (const field of $("options").elements) field.disabled = on;
  if (!on && document.activeElement === document.body) focused?.focus(); // what is disabled loses the focus
}

// -------------------------------------------------------------------------------------------------------- results

class Result {
  constructor(model) {
    this.model = model;
    this.segments = [];
    this.words = [];
    this.peaks = [];
    this.element = $("result").content.cloneNode(true).firstElementChild;
    this.element.querySelector("h2").textContent = model;
    this.canvas = this.element.querySelector("canvas");
    for (const button of this.element.querySelectorAll("[data-format]")) {
      button.setAttribute("aria-label", `Download the text of ${model} as ${button.dataset.format}`);
      button.onclick = () => this.download(button.dataset.format);
    }
    $("results").append(this.element);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  removeIfEmpty() {
    if (!this.element.querySelector(".final").textContent) this.element.remove();
  }

  addText(text) {
    this.element.querySelector(".final").append(text);
  }

  setPending(text) {
    this.element.querySelector(".pending").textContent = text;
  }

  addSegment(segment) {
    this.segments.push(segment);
    this.element.querySelector(".downloads").hidden = false;
  }

  addWords(words) {
    this.words.push(...words.filter((w) => w.gate !== undefined && w.gate !== null));
    this.draw();
  }

  // The waveform, and over it the gate of each word: high where the model reads the speech branch.
  draw() {
    const { canvas } = this;
    const style = getComputedStyle(document.documentElement);
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * scale;
    canvas.height = height * scale;
    const c = canvas.getContext("2d");
    c.scale(scale, scale);
    const seconds = Math.max(1, (this.peaks.length * PER_PEAK) / RATE);
    const loudest = this.peaks.reduce((a, b) => Math.max(a, b), 0.02);
    c.fillStyle = style.getPropertyValue("--wave");
    for (let x = 0; x < width; x++) {
      const first = Math.floor((x / width) * this.peaks.length);
      const last = Math.max(first + 1, Math.floor(((x + 1) / width) * this.peaks.length));
      let peak = 0;
      for (let i = first; i < last && i < this.peaks.length; i++) peak = Math.max(peak, this.peaks[i]);
      const half = Math.max(0.5, (peak / loudest) * (height / 2 - 6));
      c.fillRect(x, height / 2 - half, 1, 2 * half);
    }
    c.strokeStyle = style.getPropertyValue("--gate");
    c.lineWidth = 2.5;
    c.beginPath();
    let before = null;
    for (const word of this.words) {
      const y = height - 4 - word.gate * (height - 8);
      const joined = before && word.start - before.end < 0.5;
      c[joined ? "lineTo" : "moveTo"]((word.start / seconds) * width, y);
      c.lineTo((word.end / seconds) * width, y);
      before = word;
    }
    c.stroke();
    this.describe(seconds);
  }

  describe(seconds) {
    const caption = this.element.querySelector("figcaption");
    const length = `${seconds.toFixed(1)} s`;
    if (this.words.length) {
      const mean = this.words.reduce((sum, w) => sum + w.gate, 0) / this.words.length;
      const low = this.words.reduce((a, b) => (b.gate < a.gate ? b : a));
      const key = Object.assign(document.createElement("span"), { className: "key", textContent: "the gate" });
      const said = `: 1 (top) hears speech, 0 noise; mean ${mean.toFixed(2)}, lowest ${low.gate.toFixed(2)} at “${low.word.trim()}”`;
      caption.replaceChildren(`${length}; `, key, said);
    } else {
      const dual = models.find((m) => m.id === this.model)?.dual;
      caption.textContent = dual ? length : `${length}; this model has no gate`;
    }
    this.canvas.setAttribute("aria-label", `Waveform, ${caption.textContent}`);
  }

  download(format) {
    const body = { txt: asText, srt: asSrt, vtt: asVtt }[format](this.segments);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([body], { type: "text/plain" }));
    link.download = `${this.model}.${format}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

function clock(seconds, point) {
  const ms = Math.round(seconds * 1000);
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  return `${two(ms / 3600000)}:${two((ms / 60000) % 60)}:${two((ms / 1000) % 60)}${point}${String(ms % 1000).padStart(3, "0")}`;
}

const asText = (segments) => segments.map((s) => s.text.trim() + "\n").join("");
const lines = (segments, point, number) =>
  segments
    .map((s, i) => `${number ? `${i + 1}\n` : ""}${clock(s.start, point)} --> ${clock(s.end, point)}\n${s.text.trim()}\n`)
    .join("\n");
const asSrt = (segments) => lines(segments, ",", true);
const asVtt = (segments) => `WEBVTT\n\n${lines(segments, ".", false)}`;

function peaksOf(samples) {
  const peaks = [];
  for (let i = 0; i < samples.length; i += PER_PEAK) {
    let peak = 0;
    for (let j = i; j < Math.min(i + PER_PEAK, samples.length); j++) peak = Math.max(peak, Math.abs(samples[j]));
    peaks.push(peak);
  }
  return peaks;
}

function chosenModels() {
  return [...new Set([$("model").value, $("compare").value])].filter(Boolean);
}

// ---------------------------------------------------------------------------------------------------------- files

async function transcribeFile(file) {
  if (busy || !file) return;
  if (!models.length) return loadModels().then(() => transcribeFile(file), (error) => fail(error.message));
  fail("");
  setBusy(true);
  $("results").replaceChildren();
  say(`Transcribing ${file.name} …`);
  const results = chosenModels().map((model) => new Result(model));
  drawWaveform(file, results);
  const outcomes = await Promise.allSettled(results.map((result) => transcribeWith(file, result)));
  const failed = outcomes.find((o) => o.status === "rejected");
  if (failed) fail(failed.reason.message);
  for (const result of results) result.removeIfEmpty();
  say(failed ? "" : "Done.");
  setBusy(false);
}

async function drawWaveform(file, results) {
  if (file.size > MAX_DECODED) return;
  try {
    const context = new OfflineAudioContext(1, 1, RATE);
    const sound = await context.decodeAudioData(await file.arrayBuffer());
    const peaks = peaksOf(sound.getChannelData(0));
    for (const result of results) {
      result.peaks = peaks;
      result.draw();
    }
  } catch {
    // the browser knows fewer formats than the server: the text comes without a waveform
  }
}

async function transcribeWith(file, result) {
  const form = new FormData();
  form.append("file", file);
  form.append("model", result.model);
  form.append("stream", "true");
  form.append("include[]", "gate");
  for (const level of ["segment", "word"]) form.append("timestamp_granularities[]", level);
  if ($("language").value.trim()) form.append("language", $("language").value.trim());
  const response = await ask("v1/audio/transcriptions", { method: "POST", body: form });
  let complete = false;
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "transcript.text.delta") result.addText(event.delta);
    if (event.type === "transcript.text.done") {
      complete = true;
      if (!event.text) result.addText("(no speech)");
    }
    if (event.type === "transcript.text.segment") {
      result.addSegment(event);
      result.addWords(event.words ?? []);
    }
  }
  if (!complete) throw new Error("the connection ended before the text did; try again");
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) yield JSON.parse(block.replace(/^data: /, ""));
  }
}

// ------------------------------------------------------------------------------------------------------ microphone

async function startRecording() {
  fail("");
  busy = true;
  if (!models.length) await loadModels();
  if (!navigator.mediaDevices) throw new Error("the browser gives the microphone to https pages and localhost only");
  const sound = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } }).catch(() => {
    throw new Error("the microphone can't be used; allow it for this page and check that it is plugged in");
  });
  $("results").replaceChildren();
  const context = new AudioContext({ sampleRate: RATE });
  const result = new Result($("model").value);
  const url = new URL("v1/audio/live", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  live = { sound, context, socket, result, done: false };
  setBusy(true);
  socket.onopen = () =>
    socket.send(
      JSON.stringify({ model: result.model, language: $("language").value.trim(), api_key: $("key").value }),
    );
  socket.onmessage = ({ data }) => heardBack(JSON.parse(data));
  socket.onclose = () => {
    if (live && !live.done) fail(LOST);
    closeRecording();
  };
  await context.audioWorklet.addModule("recorder.js").catch(() => {
    if (live) throw new Error(LOST);
  });
  if (!live) return; // closed by the server already
  const recorder = new AudioWorkletNode(context, "recorder");
  recorder.port.onmessage = ({ data }) => {
    if (socket.readyState !== WebSocket.OPEN || !live || live.stopping) return;
    socket.send(data);
    result.peaks.push(...peaksOf(Float32Array.from(new Int16Array(data), (x) => x / 32768)));
  };
  context.createMediaStreamSource(sound).connect(recorder);
  $("record").setAttribute("aria-pressed", "true");
  $("record-label").textContent = "Stop";
  say("Listening …");
}

function heardBack(message) {
  if (!live) return;
  const { result } = live;
  if (message.type === "error") {
    live.done = true;
    fail(message.error.message);
  }
  if (message.type === "done") live.done = true;
  if (message.type !== "update") return;
  for (const word of message.words) result.addText(word.word);
  result.setPending(message.pending);
  for (const segment of message.segments) result.addSegment(segment);
  result.addWords(message.words);
}

function stopRecording() {
  live.stopping = true;
  live.sound.getTracks().forEach((track) => track.stop());
  if (live.socket.readyState === WebSocket.OPEN) live.socket.send('{"type": "finish"}');
  else {
    live.done = true; // nothing was heard yet
    live.socket.close();
  }
  $("record").disabled = true;
  say("Finishing …");
}

function closeRecording() {
  if (!live) return;
  live.sound.getTracks().forEach((track) => track.stop());
  live.context.close();
  say($("error").hidden ? "Done." : "");
  live.result.removeIfEmpty();
  live = null;
  setBusy(false);
  $("record").setAttribute("aria-pressed", "false");
  $("record-label").textContent = "Record";
}

// ---------------------------------------------------------------------------------------------------------- events

$("file").onchange = () => {
  transcribeFile($("file").files[0]);
  $("file").value = "";
};
$("record").onclick = () => {
  if (live) stopRecording();
  else if (!busy)
    startRecording().catch((error) => {
      fail(error.message);
      busy = false;
      closeRecording();
    });
};
$("key").onchange = () => loadModels().catch((error) => fail(error.message));
$("options").onsubmit = (event) => event.preventDefault();
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") transcribeFile(event.dataTransfer.files[0]);
  });
}
loadModels().catch((error) => fail(error.message));
