"use strict";
// The page is whole without this script. What it adds: the parts that change are fetched again every two seconds and
// put in place where they differ, files can be dropped to submit them, and buttons act without leaving the page.

const EVERY_MS = 2000;
const AWAY_MS = 10000;
const CHECK_MS = 500;
const PEEK_BYTES = 65536;
const ENDPOINTS = ["/v1/chat/completions", "/v1/completions"];

const $ = (id) => document.getElementById(id);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// Putting new HTML in place: nodes that stay are the same nodes, so focus, selection and scrolling stay too.

function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) {
    // What is folded out is the reader's choice.
    if (!fresh.hasAttribute(name) && name !== "open" && name !== "data-busy") old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  morphChildren(old, fresh);
}

function morphChildren(old, fresh) {
  const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let at = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const same = child.id && named.get(child.id);
    if (same) {
      if (same === at) at = at.nextSibling;
      else old.insertBefore(same, at);
      morph(same, child);
    } else if (at && !at.id && !child.id && at.nodeName === child.nodeName) {
      const next = at.nextSibling;
      morph(at, child);
      at = next;
    } else {
      old.insertBefore(child, at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function statuses() {
  return new Map([...document.querySelectorAll("[data-status]")].map((one) => [one.id, one.dataset]));
}

function put(html) {
  const before = new Map([...statuses()].map(([id, data]) => [id, data.status]));
  const fresh = new DOMParser().parseFromString(html, "text/html");
  const order = [...fresh.body.children];
  for (const part of order) {
    const there = $(part.id);
    if (there) morph(there, part);
    else if ($("job")) $("main").append(part);
  }
  if ($("job")) {
    const kept = new Set(order.map((part) => part.id));
    for (const part of document.querySelectorAll("#main > section, #main > .pair")) if (!kept.has(part.id)) part.remove();
  }
  const changed = [...statuses()].filter(([id, data]) => before.has(id) && before.get(id) !== data.status);
  if (changed.length) $("said").textContent = changed.map(([, data]) => `${data.job} is ${data.status}`).join(". ");
}

// Looking again and again, while somebody looks.

let failures = 0;
let looking = null;

async function look() {
  const path = document.body.dataset.live;
  if (!path) return;
  try {
    const answer = await fetch(path + location.search, { headers: { accept: "text/html" } });
    if (answer.status === 401) return location.assign("/");
    if (!answer.ok) throw new Error(answer.status);
    put(await answer.text());
    failures = 0;
    // An ended job stays as it is: one last look has shown its end.
    if ($("job")?.dataset.open === "no") document.body.dataset.live = "";
  } catch {
    failures += 1;
  }
  pulse();
}

function pulse() {
  const live = $("pulse");
  live.hidden = !document.body.dataset.live;
  live.classList.toggle("lost", failures > 1);
  const words = failures > 1 ? "Connection lost, trying again" : "Live";
  if (live.lastElementChild.textContent !== words) live.lastElementChild.textContent = words;
}

function lookAgain(ms = EVERY_MS) {
  clearTimeout(looking);
  looking = setTimeout(async () => {
    if (document.hidden) return;
    await look();
    lookAgain(failures > 1 ? AWAY_MS : EVERY_MS);
  }, ms);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(looking);
  else lookAgain(0);
});

// Asking the server to do something.

function notice(words, good = false) {
  const here = $("notice");
  here.textContent = words;
  here.hidden = !words;
  here.classList.toggle("good", good);
}

async function said(answer) {
  const body = await answer.json().catch(() => null);
  if (answer.ok) return body;
  throw new Error(body?.error?.message || `the server answered ${answer.status}`);
}

const asked = (path, body) =>
  fetch(path, {
    method: "POST",
    headers: { accept: "application/json", ...(body && { "content-type": "application/json" }) },
    body: body && JSON.stringify(body),
  }).then(said);

function sure() {
  const dialog = $("sure");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true }));
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  const act = form.dataset?.act;
  if (!act) return;
  event.preventDefault();
  if (form.dataset.busy || (act === "cancel" && !(await sure()))) return;
  form.dataset.busy = "yes";
  notice("");
  try {
    const done = await asked(form.getAttribute("action"));
    if (act === "retry") return location.assign(`/jobs/${encodeURIComponent(done.id)}`);
    $("said").textContent = `${form.dataset.name} is being cancelled`;
    await look();
  } catch (error) {
    notice(`${form.dataset.name}: ${error.message}`);
  } finally {
    delete form.dataset.busy;
  }
});

// A file, from the disk to a batch.

function upload(file, onProgress) {
  return new Promise((done, fail) => {
    const form = new FormData();
    form.append("purpose", "batch");
    form.append("file", file, file.name);
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/files");
    request.responseType = "json";
    request.upload.onprogress = (event) => onProgress(event.loaded, event.total);
    request.onerror = () => fail(new Error("the connection was lost"));
    request.onload = () => {
      if (request.status === 200) return done(request.response);
      fail(new Error(request.response?.error?.message || `the server answered ${request.status}`));
    };
    request.send(form);
  });
}

// All lines of a batch are for one endpoint; the first line says which.
async function endpointOf(file) {
  let start = file.slice(0, PEEK_BYTES).stream();
  if (/\.gz$/i.test(file.name)) start = file.slice(0, PEEK_BYTES).stream().pipeThrough(new DecompressionStream("gzip"));
  let text = "";
  try {
    const reader = start.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done && text.length < PEEK_BYTES; part = await reader.read()) text += part.value;
    reader.cancel().catch(() => {});
  } catch {
    // The rest of a compressed file is missing; what came before it will do.
  }
  const found = /"url"\s*:\s*"([^"]*)"/.exec(text);
  const url = found?.[1].replaceAll("\\/", "/");
  return ENDPOINTS.includes(url) ? url : ENDPOINTS[0];
}

function show(words, share) {
  const bar = $("sending-bar");
  $("sending-words").textContent = words;
  bar.hidden = share === null;
  if (share === undefined || share === null) bar.removeAttribute("value");
  else bar.value = share;
}

function showProblems(batch) {
  const here = $("problems");
  const list = batch.errors?.data ?? [];
  const rows = list.map((problem) => {
    const item = document.createElement("li");
    const where = document.createElement("b");
    where.textContent = problem.line == null ? "File" : `Line ${problem.line}`;
    const code = document.createElement("code");
    code.textContent = problem.code;
    item.append(where, ` ${problem.param ? `${problem.param}: ` : ""}${problem.message} `, code);
    return item;
  });
  const shown = document.createElement("ol");
  shown.append(...rows);
  here.replaceChildren(shown);
  here.hidden = !rows.length;
}

function link(batch) {
  const to = document.createElement("a");
  to.href = `/jobs/${encodeURIComponent(batch.id)}`;
  to.textContent = "Open it";
  to.id = "sent";
  $("sending-link").replaceChildren(to);
  $("sending-link").hidden = false;
}

async function send(file) {
  notice("");
  $("sending").hidden = false;
  $("sending-link").hidden = true;
  $("problems").hidden = true;
  $("sending-name").textContent = file.name;
  let tenth = -1;
  try {
    show("is being uploaded", 0);
    const stored = await upload(file, (loaded, total) => {
      $("sending-bar").value = loaded / total;
      // Read aloud ten times, not a hundred.
      if (Math.floor((loaded / total) * 10) > tenth) {
        tenth = Math.floor((loaded / total) * 10);
        show(`is being uploaded: ${tenth * 10}%`, loaded / total);
      }
    });
    show("is uploaded; its lines are being checked");
    let batch = await asked("/v1/batches", {
      input_file_id: stored.id,
      endpoint: await endpointOf(file),
      completion_window: "24h",
      loramill: { on_invalid: $("skip").checked ? "skip" : "fail" },
    });
    link(batch);
    lookAgain(0);
    while (batch.status === "validating") {
      await pause(CHECK_MS);
      batch = await fetch(`/v1/batches/${batch.id}`).then(said);
    }
    if (batch.status === "failed") {
      const count = batch.errors?.data?.length ?? 0;
      show(`was refused: ${count}${count >= 100 ? " or more" : ""} invalid ${count === 1 ? "line" : "lines"}. Nothing ran.`, null);
      $("sending-words").className = "bad";
      showProblems(batch);
    } else {
      show(`is accepted: ${batch.request_counts.total.toLocaleString("en")} rows.`, null);
      $("sending-words").className = "";
    }
  } catch (error) {
    show("was not submitted.", null);
    notice(`${file.name}: ${error.message}`);
  }
  lookAgain(0);
}

async function sendAll(files) {
  for (const file of files) await send(file);
}

function setUpDrop() {
  const form = $("drop");
  const file = $("file");
  form.hidden = false;
  file.addEventListener("change", async () => {
    const chosen = [...file.files];
    file.value = "";
    await sendAll(chosen);
  });
  // A file may be dropped anywhere: a miss must not open it in place of the page.
  let inside = 0;
  const hot = (on) => form.classList.toggle("hot", on);
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => holdsFiles(event) && (inside++, hot(true)));
  addEventListener("dragleave", (event) => holdsFiles(event) && --inside <= 0 && ((inside = 0), hot(false)));
  addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    inside = 0;
    hot(false);
    sendAll([...event.dataTransfer.files]);
  });
}

if ($("drop")) setUpDrop();
pulse();
lookAgain();
