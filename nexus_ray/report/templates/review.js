"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const pageToken = document.querySelector('meta[name="page-token"]').content;
  const done = { accept: "accepted", reject: "rejected", edit: "edited", override: "edited against the filters" };
  let row = null, busy = false;
  history.replaceState(null, "", "/"); // the token stays out of the address bar and of screenshots

  async function ask(path, body) {
    const options = body === undefined ? {} : {
      method: "POST", body: JSON.stringify(body),
      headers: { "Content-Type": "application/json", "X-Review-Token": pageToken },
    };
    let answer;
    try { answer = await fetch(path, options); } catch { throw new Error("The review server does not answer; nothing was saved."); }
    const data = await answer.json();
    if (!answer.ok) throw new Error(data.error);
    return data;
  }

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    made.textContent = text; // text of rows is never markup
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function pairs(id, values) {
    const list = byId(id);
    list.replaceChildren();
    for (const [name, value] of Object.entries(values ?? {})) {
      const shown = typeof value === "number" ? String(+value.toPrecision(4)) : typeof value === "string" ? value : JSON.stringify(value);
      list.append(element("dt", name), element("dd", shown, { dir: "auto" }));
    }
    if (!list.children.length) list.append(element("dt", "none"), element("dd", ""));
  }

  function show(found, said) {
    row = found;
    const decided = row.action ? ` (${done[row.action]})` : "";
    byId("row").hidden = false;
    byId("title").textContent = `Row ${row.place + 1} of ${row.count}${decided}`;
    byId("progress").textContent = `${row.decided} of ${row.count} decided`;
    document.title = `${row.place + 1}/${row.count} – review`;
    byId("reason").lastElementChild.textContent = row.reason || "no reason was given";
    byId("text").textContent = row.edited ?? row.text;
    closeEditor();
    for (const [key, action] of [["a", "accept"], ["r", "reject"], ["e", "edit"]])
      document.querySelector(`[data-key="${key}"]`).setAttribute("aria-pressed", String(row.action === action || (action === "edit" && row.action === "override")));
    pairs("scores", row.scores);
    pairs("parameters", row.parameters);
    pairs("history", { row: row.id, generator: row.generator ?? "unknown", parents: (row.parents ?? []).join(", ") || "none" });
    const turns = typeof row.prompt === "string" ? [{ role: "text", content: row.prompt }] : row.prompt ?? [];
    byId("prompt").replaceChildren(...turns.flatMap((turn) => [element("h4", turn.role), element("pre", turn.content, { dir: "auto" })]));
    byId("source-part").hidden = !row.source;
    byId("source").textContent = row.source ?? "";
    const heard = `Row ${row.place + 1}${decided}: ${row.reason || "no reason was given"}`; // seen below, so only spoken
    byId("status").replaceChildren(element("span", said && `${said} `), element("span", heard, { class: "unseen" }));
  }

  // One thing at a time: a key pressed while an answer is awaited must not decide the row that comes next.
  async function work(task) {
    if (busy) return;
    busy = true;
    byId("problem").textContent = "";
    try { await task(); } catch (error) { byId("problem").textContent = error.message; } finally { busy = false; }
  }

  async function open(place, said = "") {
    show(await ask(`/rows/${place}`), said);
    byId("title").focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }

  async function decide(action, text) {
    const place = row.place;
    const counts = await ask("/decisions", { place, id: row.id, action, text });
    const said = `Row ${place + 1} ${done[action]}.`;
    if (counts.decided === counts.count) return open(place, `${said} All ${counts.count} rows are decided; you may close this page.`);
    return open(Math.min(place + 1, counts.count - 1), said);
  }

  async function undo() {
    const { place } = await ask("/undo", {});
    return open(place, `Decision on row ${place + 1} taken back.`);
  }

  function step(by) {
    const place = row.place + by;
    if (place < 0 || place >= row.count) throw new Error(by < 0 ? "This is the first row." : "This is the last row.");
    return open(place);
  }

  function openEditor() {
    byId("edit").value = row.edited ?? row.refused ?? row.text; // what was refused is not written again
    byId("text").hidden = true;
    byId("editor").hidden = false;
    byId("actions").hidden = true; // leaving the row would lose what was written
    byId("edit").focus();
  }

  function closeEditor() {
    byId("text").hidden = false;
    byId("editor").hidden = true;
    byId("actions").hidden = false;
  }

  function cancel() {
    closeEditor();
    byId("status").textContent = "Nothing changed.";
    byId("title").focus();
  }

  const save = () => work(() => decide("edit", byId("edit").value));
  const override = () => work(() => decide("override", byId("edit").value));
  const keys = {
    a: () => decide("accept"), r: () => decide("reject"), e: openEditor, u: undo, j: () => step(1), k: () => step(-1),
  };
  const press = (key) => { if (row) work(async () => keys[key]()); };

  document.addEventListener("keydown", (event) => {
    const editing = !byId("editor").hidden;
    if (editing && event.key === "Escape") { event.preventDefault(); cancel(); }
    else if (editing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); save(); }
    else if (!editing && byId("keys").checked && !event.ctrlKey && !event.metaKey && !event.altKey && !event.repeat && Object.hasOwn(keys, event.key)) {
      event.preventDefault();
      press(event.key);
    }
  });
  for (const button of document.querySelectorAll("[data-key]")) button.addEventListener("click", () => press(button.dataset.key));
  byId("save").addEventListener("click", save);
  byId("override").addEventListener("click", override);
  byId("cancel").addEventListener("click", cancel);
  work(async () => {
    try { await open(0); } catch (error) { byId("title").textContent = "Nothing to review"; byId("status").textContent = error.message; }
  });
})();
