// One model's text of one recording: waveform, timed lines, the gate of each word, downloads.
import { FORMATS, clock } from "./text.js";

const RATE = 16000;
const PER_PEAK = 320; // samples behind one stroke of the waveform: 20 ms
const GATES = 26; // pixels under the waveform for the gate

export function peaksOf(samples) {
  const peaks = [];
  for (let i = 0; i < samples.length; i += PER_PEAK) {
    let peak = 0;
    for (let j = i; j < Math.min(i + PER_PEAK, samples.length); j++) peak = Math.max(peak, Math.abs(samples[j]));
    peaks.push(peak);
  }
  return peaks;
}

export class Result {
  // play(seconds) lets the recording be heard from there.
  constructor(recording, model, play) {
    Object.assign(this, { recording, model, play, segments: [], words: [], peaks: [], done: 0, now: null, openWords: 0 });
    this.element = document.getElementById("result").content.cloneNode(true).firstElementChild;
    this.element.querySelector("h2").textContent = `${recording}, ${model.id}`;
    this.canvas = this.element.querySelector("canvas");
    this.canvas.onclick = (event) => play((event.offsetX / this.canvas.clientWidth) * this.seconds);
    this.lines = this.element.querySelector(".lines");
    for (const button of this.element.querySelectorAll("[data-format]")) {
      button.setAttribute("aria-label", `Download the text of ${model.id} as ${button.dataset.format}`);
      button.onclick = () => this.download(button.dataset.format);
    }
    const copy = this.element.querySelector(".copy");
    copy.onclick = async () => {
      await navigator.clipboard.writeText(FORMATS.txt(this.segments));
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    };
    new ResizeObserver(() => this.drawSoon()).observe(this.canvas);
  }

  get seconds() {
    return Math.max(1, (this.peaks.length * PER_PEAK) / RATE, this.done);
  }

  get empty() {
    return !this.lines.textContent;
  }

  addSegment(segment) {
    this.segments.push(segment);
    this.done = segment.end;
    for (const word of (segment.words ?? []).slice(this.openWords)) this.addWord(word);
    if (!this.openWords) this.newLine(segment.start).append(segment.text.trim());
    this.open = null;
    this.openWords = 0;
    this.element.querySelector(".downloads").hidden = false;
  }

  // A word of the line that is open; live words come before their segment does.
  addWord(word) {
    this.open ??= this.newLine(word.start);
    const element = document.createElement("span");
    element.className = "word";
    element.textContent = word.word.trim();
    element.onclick = () => this.play(word.start);
    const sure = word.probability === undefined ? [] : [`probability ${Math.round(100 * word.probability)}%`];
    if (word.gate !== undefined && word.gate !== null) {
      const noise = Math.min(1, Math.max(0, (0.75 - word.gate) / 0.5));
      element.style.setProperty("--noise", noise);
      sure.push(`gate ${word.gate.toFixed(2)}${noise > 0.5 ? ": heard in noise, check this one" : ""}`);
    }
    element.title = sure.join(", ");
    element.classList.toggle("unsure", word.probability < 0.5);
    this.openWords++;
    this.open.append(element, " ");
    this.words.push({ ...word, element });
    this.follow();
    this.drawSoon();
  }

  newLine(start) {
    const line = document.createElement("li");
    const time = document.createElement("button");
    Object.assign(time, { type: "button", className: "time", textContent: clock(start), onclick: () => this.play(start) });
    time.setAttribute("aria-label", `Play from ${clock(start)}`);
    const text = document.createElement("span");
    line.append(time, text);
    this.lines.append(line);
    return text;
  }

  follow() {
    const box = this.lines.parentElement;
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
  }

  say(text) {
    this.lines.append(Object.assign(document.createElement("li"), { textContent: text }));
  }

  setPending(text) {
    this.element.querySelector(".pending").textContent = text;
  }

  setLanguage(name) {
    if (name) this.element.querySelector("h2").append(Object.assign(document.createElement("small"), { textContent: ` ${name}` }));
  }

  mark(seconds) {
    this.now = seconds;
    for (const word of this.words) word.element.classList.toggle("spoken", word.start <= seconds && seconds < word.end);
    this.drawSoon();
  }

  markDifferences(places) {
    for (const place of places) this.words[place].element.classList.add("differs");
  }

  drawSoon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  // The waveform, its done part coloured, and under it the gate of each word: high where the speech branch is read.
  draw() {
    const { canvas } = this;
    const style = getComputedStyle(document.documentElement);
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * scale;
    canvas.height = height * scale;
    const c = canvas.getContext("2d");
    c.scale(scale, scale);
    const at = (seconds) => (seconds / this.seconds) * width;
    const middle = (height - GATES) / 2;
    const loudest = this.peaks.reduce((a, b) => Math.max(a, b), 0.02);
    for (let x = 0; x < width; x++) {
      const first = Math.floor((x / width) * this.peaks.length);
      const last = Math.max(first + 1, Math.floor(((x + 1) / width) * this.peaks.length));
      let peak = 0;
      for (let i = first; i < last && i < this.peaks.length; i++) peak = Math.max(peak, this.peaks[i]);
      const half = Math.max(0.5, (peak / loudest) * (middle - 4));
      c.fillStyle = style.getPropertyValue(x < at(this.done) ? "--done" : "--wave");
      c.fillRect(x, middle - half, 1, 2 * half);
    }
    c.fillStyle = style.getPropertyValue("--gate");
    for (const word of this.words) {
      if (word.gate === undefined || word.gate === null) continue;
      const high = Math.max(1, word.gate * (GATES - 6));
      c.fillRect(at(word.start), height - high, Math.max(2, at(word.end) - at(word.start) - 1), high);
    }
    if (this.now !== null) {
      c.fillStyle = style.getPropertyValue("--ink");
      c.fillRect(at(this.now), 0, 2, height);
    }
    this.describe();
  }

  describe() {
    const caption = this.element.querySelector("figcaption");
    const length = `${this.seconds.toFixed(1)} s`;
    const gated = this.words.filter((word) => word.gate !== undefined && word.gate !== null);
    if (gated.length) {
      const mean = gated.reduce((sum, w) => sum + w.gate, 0) / gated.length;
      const low = gated.reduce((a, b) => (b.gate < a.gate ? b : a));
      const name = Object.assign(document.createElement("span"), { className: "key", textContent: "the gate" });
      const said = `: high hears speech, low noise; mean ${mean.toFixed(2)}, lowest ${low.gate.toFixed(2)} at “${low.word.trim()}”. Shaded words were heard in noise.`;
      caption.replaceChildren(`${length}; `, name, said);
    } else {
      caption.textContent = this.model.dual ? length : `${length}; this model has no gate`;
    }
    this.canvas.setAttribute("aria-label", `Waveform, ${caption.textContent}`);
  }

  download(format) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([FORMATS[format](this.segments)], { type: "text/plain" }));
    link.download = `${this.recording.replace(/\.[^.]+$/, "")}.${format}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}
