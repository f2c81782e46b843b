// The page: recordings go to /v1/audio/transcriptions as a stream of events, the microphone to the live WebSocket.
import { Result, peaksOf } from "./result.js";
import { NeedsKey, ask, key, transcriptionEvents } from "./server.js";
import { clock, differences } from "./text.js";

const RATE = 16000;
const MAX_DECODED = 200e6; // bytes of a file that the browser is asked to decode for its waveform
const MAX_COMPARED = 3000; // words of a text whose differences are looked for
const LOST = "the connection to the server was lost; record again";

const $ = (id) => document.getElementById(id);
let busy = false;
let live = null;
let focused = null;
let models = [];
let shown = []; // results of the recording that can be played
const waiting = []; // files

// ------------------------------------------------------------------------------------------------------- messages

function say(text) {
  $("status").textContent = text;
}

function fail(error) {
  const text = typeof error === "string" ? error : error.message;
  if (error instanceof NeedsKey) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  $("error").textContent = text;
  $("error").hidden = !text;
}

const modelOf = (id) => models.find((model) => model.id === id);

async function loadModels() {
  models = (await (await ask("v1/models")).json()).data;
  const named = models.map((m) => new Option(m.dual ? `${m.id} (with gate)` : m.id, m.id));
  $("model").replaceChildren(...named);
  $("compare").replaceChildren(new Option("nothing", ""), ...named.map((o) => o.cloneNode(true)));
  $("compare-label").hidden = models.length < 2;
  $("key-form").hidden = true;
  offerLanguages();
  fail("");
}

function offerLanguages() {
  const before = $("language").value;
  const known = modelOf($("model").value)?.languages ?? {};
  const named = Object.entries(known).map(([code, name]) => new Option(name, code));
  named.sort((a, b) => a.text.localeCompare(b.text));
  $("language").replaceChildren(...(named.length > 1 ? [new Option("Detect automatically", "")] : []), ...named);
  if (before in known) $("language").value = before;
}

function setBusy(on) {
  busy = on;
  if (on) focused = document.activeElement;
  $("record").disabled = on && !live;
  for (const field of $("options").elements) field.disabled = on;
  $("empty").hidden = on || $("results").childElementCount > 0;
  if (!on && document.activeElement === document.body) focused?.focus(); // what is disabled loses the focus
}

// ---------------------------------------------------------------------------------------------------------- sound

function play(seconds) {
  $("player").currentTime = seconds;
  $("player").play();
}

function hear(blob) {
  URL.revokeObjectURL($("player").src);
  $("player").src = URL.createObjectURL(blob);
  $("player").hidden = false;
}

$("player").ontimeupdate = () => {
  for (const result of shown) result.mark($("player").currentTime);
};

function show(recording, ids) {
  shown = ids.map((id) => new Result(recording, modelOf(id), play));
  $("results").prepend(...shown.map((result) => result.element));
  return shown;
}

// ---------------------------------------------------------------------------------------------------------- files

function give(files) {
  waiting.push(...files);
  if (!busy) next();
  listWaiting();
}

function listWaiting() {
  $("waiting").replaceChildren(
    ...waiting.map((file) => Object.assign(document.createElement("li"), { textContent: `${file.name} waits` })),
  );
}

async function next() {
  const file = waiting.shift();
  listWaiting();
  if (!file) return;
  try {
    if (!models.length) await loadModels();
    await transcribeFile(file);
  } catch (error) {
    fail(error);
  }
  next();
}

const chosenModels = () => [...new Set([$("model").value, $("compare").value])].filter(Boolean);

async function transcribeFile(file) {
  fail("");
  setBusy(true);
  say(`Transcribing ${file.name} …`);
  const results = show(file.name, chosenModels());
  const stop = new AbortController();
  $("cancel").onclick = () => stop.abort();
  $("cancel").hidden = false;
  hear(file);
  const length = drawWaveform(file, results);
  const outcomes = await Promise.allSettled(results.map((result) => transcribeWith(file, result, length, stop.signal)));
  $("cancel").hidden = true;
  for (const result of results) if (result.empty) result.element.remove();
  const failed = outcomes.map((o) => o.reason).find(Boolean);
  if (failed && !stop.signal.aborted) fail(failed);
  say(stop.signal.aborted ? "Cancelled." : failed ? "" : "Done.");
  if (!failed && results.length === 2) compare(results);
  setBusy(false);
}

function compare(results) {
  const texts = results.map((result) => result.words.map((word) => word.word));
  if (Math.max(...texts.map((words) => words.length)) > MAX_COMPARED) return;
  differences(...texts).forEach((places, i) => results[i].markDifferences(places));
}

// -> seconds of the recording, 0 where the browser can't tell: it knows fewer formats than the server.
async function drawWaveform(file, results) {
  if (file.size > MAX_DECODED) return 0;
  try {
    const context = new OfflineAudioContext(1, 1, RATE);
    const sound = await context.decodeAudioData(await file.arrayBuffer());
    const peaks = peaksOf(sound.getChannelData(0));
    for (const result of results) {
      result.peaks = peaks;
      result.drawSoon();
    }
    return sound.duration;
  } catch {
    return 0;
  }
}

async function transcribeWith(file, result, length, signal) {
  const began = performance.now();
  const fields = { model: result.model.id, task: $("task").value, language: $("language").value, prompt: $("prompt").value };
  for await (const event of transcriptionEvents(file, fields, signal)) {
    if (event.type === "transcript.text.segment") {
      result.addSegment(event);
      progress(result.done, await length, (performance.now() - began) / 1000);
    }
    if (event.type === "transcript.text.done") {
      if (!event.text) result.say("(no speech)");
      result.setLanguage(event.language);
    }
  }
  result.done = await length;
  result.drawSoon();
}

function progress(done, length, spent) {
  if (!length) return say(`${clock(done)} transcribed`);
  const left = (spent / done) * (length - done);
  const about = left > 90 ? `${Math.round(left / 60)} min` : `${Math.max(1, Math.round(left))} s`;
  say(`${clock(done)} of ${clock(length)}, about ${about} left`);
}

async function playSample() {
  const response = await fetch("sample.opus");
  const file = new File([await response.blob()], "sample in noise.opus", { type: "audio/ogg" });
  if (!$("compare").value && models.length > 1) $("compare").value = models.find((m) => m.id !== $("model").value).id;
  give([file]);
  play(0);
}

// ------------------------------------------------------------------------------------------------------ microphone

async function startRecording() {
  fail("");
  busy = true;
  if (!models.length) await loadModels();
  if (!navigator.mediaDevices) throw new Error("the browser gives the microphone to https pages and localhost only");
  // the browser's own clean-up is made for calls; the model wants the sound as it is
  const asIs = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const sound = await navigator.mediaDevices.getUserMedia({ audio: asIs }).catch(() => {
    throw new Error("the microphone can't be used; allow it for this page and check that it is plugged in");
  });
  const context = new AudioContext({ sampleRate: RATE });
  const [result] = show(`recording ${new Date().toLocaleTimeString()}`, [$("model").value]);
  const url = new URL("v1/audio/live", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  live = { sound, context, socket, result, done: false, pieces: [] };
  setBusy(true);
  socket.onopen = () => {
    const [language, task, prompt] = ["language", "task", "prompt"].map((id) => $(id).value);
    socket.send(JSON.stringify({ model: result.model.id, language, task, prompt, api_key: key.get() }));
  };
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
  recorder.port.onmessage = ({ data }) => heardSound(data);
  context.createMediaStreamSource(sound).connect(recorder);
  $("record").setAttribute("aria-pressed", "true");
  $("record-label").textContent = "Stop";
  $("live").hidden = false;
  say("Listening …");
}

function heardSound(data) {
  if (!live || live.stopping || live.socket.readyState !== WebSocket.OPEN) return;
  live.socket.send(data);
  live.pieces.push(data);
  const peaks = peaksOf(Float32Array.from(new Int16Array(data), (x) => x / 32768));
  live.result.peaks.push(...peaks);
  live.result.drawSoon();
  $("level").value = Math.sqrt(Math.max(...peaks));
  $("clock").textContent = clock(live.result.seconds);
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
  let words = message.words;
  for (const segment of message.segments) {
    words = words.slice(segment.words.length - result.openWords);
    result.addSegment(segment);
  }
  for (const word of words) result.addWord(word);
  result.setPending(message.pending);
  result.done = message.now;
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
  if (live.result.empty) live.result.element.remove();
  hear(wavOf(live.pieces));
  live = null;
  $("live").hidden = true;
  setBusy(false);
  $("record").setAttribute("aria-pressed", "false");
  $("record-label").textContent = "Record";
  next();
}

function wavOf(pieces) {
  const size = pieces.reduce((sum, piece) => sum + piece.byteLength, 0);
  const head = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((c, i) => head.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  head.setUint32(4, 36 + size, true);
  text(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  [1, 1].forEach((value, i) => head.setUint16(20 + 2 * i, value, true));
  head.setUint32(24, RATE, true);
  head.setUint32(28, 2 * RATE, true);
  [2, 16].forEach((value, i) => head.setUint16(32 + 2 * i, value, true));
  text(36, "data");
  head.setUint32(40, size, true);
  return new Blob([head, ...pieces], { type: "audio/wav" });
}

// ---------------------------------------------------------------------------------------------------------- events

$("file").onchange = () => {
  give($("file").files);
  $("file").value = "";
};
$("record").onclick = () => {
  if (live) stopRecording();
  else if (!busy)
    startRecording().catch((error) => {
      fail(error);
      busy = false;
      closeRecording();
    });
};
$("sample").onclick = () => playSample().catch(fail);
$("model").onchange = offerLanguages;
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  key.set($("key").value);
  loadModels().catch(fail);
};
$("options").onsubmit = (event) => event.preventDefault();
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") give(event.dataTransfer.files);
  });
}
loadModels().catch(fail);
