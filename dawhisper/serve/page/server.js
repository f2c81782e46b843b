// What is asked of the server: its models, and a recording's text as a stream of events.

export class NeedsKey extends Error {}

export const key = {
  get: () => sessionStorage.getItem("key") ?? "",
  set: (value) => sessionStorage.setItem("key", value),
};

export async function ask(path, options = {}) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("the server can't be reached; is it still running?");
  });
  if (response.ok) return response;
  if (response.status === 401) throw new NeedsKey(key.get() ? "the server does not take this key" : "");
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

export async function* transcriptionEvents(file, fields, signal) {
  const form = new FormData();
  form.append("file", file);
  for (const [name, value] of Object.entries(fields)) if (value) form.append(name, value);
  form.append("stream", "true");
  form.append("include[]", "gate");
  for (const level of ["segment", "word"]) form.append("timestamp_granularities[]", level);
  const path = fields.task === "translate" ? "v1/audio/translations" : "v1/audio/transcriptions";
  form.delete("task");
  const response = await ask(path, { method: "POST", body: form, signal });
  let complete = false;
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message);
    complete ||= event.type === "transcript.text.done";
    yield event;
  }
  if (signal.aborted) throw new DOMException("cancelled", "AbortError");
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
    // a comment keeps the connection open
    for (const block of blocks) if (!block.startsWith(":")) yield JSON.parse(block.replace(/^data: /, ""));
  }
}
