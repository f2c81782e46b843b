// Text as people read it and as files hold it, and where two texts differ.

export function clock(seconds) {
  const s = Math.floor(seconds);
  const minutes = `${Math.floor((s / 60) % 60)}`;
  const rest = `${minutes.padStart(s >= 3600 ? 2 : 1, "0")}:${String(s % 60).padStart(2, "0")}`;
  return s >= 3600 ? `${Math.floor(s / 3600)}:${rest}` : rest;
}

function stamp(seconds, point) {
  const ms = Math.round(seconds * 1000);
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  return `${two(ms / 3600000)}:${two((ms / 60000) % 60)}:${two((ms / 1000) % 60)}${point}${String(ms % 1000).padStart(3, "0")}`;
}

const cues = (segments, point, numbered) =>
  segments
    .map((s, i) => `${numbered ? `${i + 1}\n` : ""}${stamp(s.start, point)} --> ${stamp(s.end, point)}\n${s.text.trim()}\n`)
    .join("\n");

export const FORMATS = {
  txt: (segments) => segments.map((s) => `${s.text.trim()}\n`).join(""),
  srt: (segments) => cues(segments, ",", true),
  vtt: (segments) => `WEBVTT\n\n${cues(segments, ".", false)}`,
  json: (segments) => JSON.stringify({ text: segments.map((s) => s.text).join("").trim(), segments }, null, 2),
};

const plain = (word) => word.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");

// The words of each text that the other one lacks, as sets of places: by the longest common subsequence.
export function differences(a, b) {
  const [x, y] = [a.map(plain), b.map(plain)];
  const width = y.length + 1;
  const longest = new Uint16Array((x.length + 1) * width);
  for (let i = x.length - 1; i >= 0; i--)
    for (let j = y.length - 1; j >= 0; j--)
      longest[i * width + j] =
        x[i] === y[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  const only = [new Set(x.keys()), new Set(y.keys())];
  for (let i = 0, j = 0; i < x.length && j < y.length; ) {
    if (x[i] === y[j]) {
      only[0].delete(i++);
      only[1].delete(j++);
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return only;
}
