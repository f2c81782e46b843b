// The API as /openapi.json describes it: each path with its fields and a command to try it.

const operation = document.getElementById("operation");

function fieldsOf(described) {
  const body = described.requestBody?.content["multipart/form-data"].schema;
  return {
    ...Object.fromEntries((described.parameters ?? []).map((p) => [p.name, `in the ${p.in}`])),
    ...Object.fromEntries(
      Object.entries(body?.properties ?? {}).map(([name, field]) => [
        name, (body.required?.includes(name) ? "required: " : "") + (field.description ?? field.type),
      ])),
  };
}

function command(path, method, described) {
  const key = described.security ? " -H 'Authorization: Bearer KEY'" : "";
  const file = described.requestBody ? " -F file=@recording.wav" : "";
  return `curl${method === "get" ? "" : ` -X ${method.toUpperCase()}`}${key}${file} ${location.origin}${path}`;
}

function show(path, method, described) {
  const made = operation.content.cloneNode(true);
  made.querySelector("h2").textContent = `${method.toUpperCase()} ${path}`;
  made.querySelector("p").textContent = described.description ?? "";
  made.querySelector("code").textContent = command(path, method, described);
  const rows = Object.entries(fieldsOf(described));
  made.querySelector("table").hidden = !rows.length;
  made.querySelector("caption").textContent = described.requestBody ? "Fields of the form" : "Parameters";
  for (const [name, text] of rows) {
    const row = made.querySelector("tbody").insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    row.insertCell().textContent = text;
  }
  document.getElementById("paths").append(made);
}

try {
  const api = await (await fetch("openapi.json")).json();
  document.getElementById("title").textContent = `${api.info.title} ${api.info.version}: API`;
  document.getElementById("about").textContent = api.info.description;
  for (const [path, methods] of Object.entries(api.paths))
    for (const [method, described] of Object.entries(methods)) show(path, method, described);
} catch {
  document.getElementById("error").textContent = "openapi.json can't be read; is the server still running?";
  document.getElementById("error").hidden = false;
}
