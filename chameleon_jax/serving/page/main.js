// The page: tiles, buttons, figures. What it knows of streams is in connection.js, player.js and
// film.js.

import { available, picture as fromCamera } from "./camera.js";
import { Stream, manifest, ready, recording, upload, wardrobe } from "./connection.js";
import { FilmPlayer } from "./film.js";
import { Player } from "./player.js";

const at = (id) => document.getElementById(id);
const tiles = { garment: at("garments"), person: at("people") };
const chosen = { garment: null, person: null };
const pictures = new Map(); // by name

const FALL_BACK = { h264: "mp4", mp4: "jpeg" }; // if a browser cannot play a codec
const COME_BACK = 9000; // milliseconds in which the server keeps a stream that was cut off

let stream = null;
let player = null;
let session = null;
let model = ""; // that the server runs
let changes = 0;
let asked = new Map(); // changes that were not seen yet: number -> what, and the time of the click
let applied = new Map(); // first frame -> number of the change
let replayed = null; // the manifest of the stream that is made again
let cutOff = 0; // when the connection was lost
let received = 0; // frames that have come
const shownAt = []; // times of the last frames

// What tests and curious people may look at: milliseconds from a click to the changed frame, and what
// they were spent on.
window.chameleon = { latencies: [], applied: [], shown: 0 };

function status(text) { at("status").textContent = text; }

function notice(text, wrong = false) {
  at("notice").textContent = text;
  at("notice").classList.toggle("wrong", wrong);
}

function addTile(picture) {
  if (pictures.has(picture.name)) return;
  pictures.set(picture.name, picture);
  const tile = at("tile").content.firstElementChild.cloneNode(true);
  tile.querySelector("img").src = picture.thumbnail;
  tile.querySelector("span").textContent = picture.title;
  tile.setAttribute("aria-label", `${picture.kind}: ${picture.title}`);
  tile.dataset.name = picture.name;
  tile.addEventListener("click", () => choose(picture.kind, picture.name));
  const box = tiles[picture.kind];
  box.insertBefore(tile, box.querySelector(".upload"));
}

async function useOwn(kind, file) {
  if (!file) return;
  notice("opening your picture");
  try {
    const picture = await upload(kind, file);
    addTile({ ...picture, title: "yours" });
    choose(kind, picture.name);
    notice("");
  } catch (error) {
    notice(error.message, true);
  }
}

function addCamera() {
  const tile = at("snapshot").content.firstElementChild.cloneNode(true);
  tile.addEventListener("click", async () => {
    try {
      await useOwn("person", await fromCamera());
    } catch {
      notice("the camera cannot be used: there is none, or this page may not use it", true);
    }
  });
  tiles.person.append(tile);
}

function addUpload(kind) {
  const tile = at("upload").content.firstElementChild.cloneNode(true);
  const input = tile.querySelector("input");
  tile.setAttribute("aria-label", `your own picture of a ${kind}`);
  const send = (file) => useOwn(kind, file);
  input.addEventListener("change", () => send(input.files[0]));
  tile.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") input.click();
  });
  tile.addEventListener("dragover", (event) => {
    event.preventDefault();
    tile.classList.add("over");
  });
  tile.addEventListener("dragleave", () => tile.classList.remove("over"));
  tile.addEventListener("drop", (event) => {
    event.preventDefault();
    tile.classList.remove("over");
    send(event.dataTransfer.files[0]);
  });
  tiles[kind].append(tile);
}

function choose(kind, name, now = true) {
  chosen[kind] = name;
  for (const tile of tiles[kind].querySelectorAll("button[data-name]")) {
    tile.setAttribute("aria-selected", String(tile.dataset.name === name));
  }
  at("start").disabled = !(chosen.garment && chosen.person);
  if (now && session) change({ [kind]: name });
}

// What a change does, besides to show the new picture; each has a box of that name.
const OPTIONAL = ["withdraw", "disentangle", "anchor", "carry"];

// A change goes on from one thing, and from the motion only if the frames before are forgotten.
function settle(word) {
  if (!at(word).checked) {
    if (word === "withdraw") at("carry").checked = false;
  } else if (word === "carry") {
    at("disentangle").checked = false;
    at("withdraw").checked = true;
  } else if (word === "disentangle") {
    at("carry").checked = false;
  }
}

function mechanisms() {
  return ["refresh", ...OPTIONAL.filter((word) => at(word).checked)];
}

function change(values) {
  if (stream.over) return;
  changes += 1;
  asked.set(changes, { ...values, clicked: performance.now() });
  at("change").textContent = "...";
  tell(changes, values);
}

function tell(id, values) {
  const hold = window.chameleon.shown + player.lead;
  player.hold.begin(hold, id);
  stream.say("session.interaction", { id, hold, mechanisms: mechanisms(), ...values });
}

// Changes that were lost with the connection.
function tellAgain() {
  for (const [id, { clicked, understood, ...values }] of asked) {
    if (!understood && values.at === undefined) tell(id, values);
  }
}

// Begin a stream with what is chosen; `plan` is a manifest to make again.
function start(plan = null) {
  stream?.close();
  player?.stop();
  session = null;
  changes = 0;
  asked = new Map();
  applied = new Map();
  replayed = plan;
  window.chameleon.shown = received = 0;
  at("timeline").replaceChildren();
  setPaused(false);
  const codec = at("codec").value;
  at("screen").hidden = codec === "mp4";
  at("film").hidden = codec !== "mp4";
  player = codec === "mp4" ? new FilmPlayer(at("film"), shown) : new Player(at("screen"), shown);
  player.onFailed = (error) => {
    notice(`the video cannot be shown (${error.message}); start again, or choose another codec`, true);
  };
  remember(chosen.garment);
  connect({
    person: chosen.person,
    garment: chosen.garment,
    prompt: at("prompt").value,
    seed: Number(at("seed").value) || 0,
    codec,
    mechanisms: plan ? words(plan.changes[0].mechanisms) : mechanisms(),
    paused: Boolean(plan),
  });
  status("starting");
  notice("");
  at("start").textContent = "Start again";
}

function connect(values) {
  stream = new Stream(values, heard);
}

async function heard(message, packets) {
  switch (message.type) {
    case "session.queued":
      notice(`others are before you: place ${message.position}`);
      break;
    case "session.ready":
      cutOff = 0;
      if (!session && replayed) await plan(replayed);
      ({ session } = message);
      at("pause").disabled = at("download").disabled = false;
      status(replayed ? "replay" : "live");
      notice(replayed && replayed.model !== model
        ? `made with the model ${replayed.model}: with ${model} it looks different` : "");
      break;
    case "video.start":
      try {
        await player.begin(message);
        tellAgain();
      } catch (error) {
        at("codec").value = FALL_BACK[at("codec").value];
        const what = at("codec").selectedOptions[0].textContent;
        start(replayed);
        notice(`this browser cannot play that here (${error.message}): going on with ${what}`);
      }
      break;
    case "video.chunk":
      note(message);
      await player.add(message, packets).catch(player.onFailed);
      at("made").textContent = `${(1000 * message.frames / message.made_ms).toFixed(1)} frames/s`;
      break;
    case "session.flush":
      player.flush(message.from_frame);
      received = message.from_frame;
      for (const first of applied.keys()) if (first >= message.from_frame) applied.delete(first);
      break;
    case "session.interaction.queued":
      if (asked.has(message.id)) asked.get(message.id).understood = true;
      break;
    case "session.applied":
      player.hold.end(message.id);
      applied.set(message.first_frame, message);
      break;
    case "session.error":
      player.hold.end(message.id);
      notice(message.message, true);
      break;
    case "session.done":
      stream.over = true;
      status("ended");
      break;
    case "closed":
      if (!stream.over) lost(message.code);
      break;
  }
}

// The connection was lost: come back to the same stream, as long as the server keeps it.
function lost(code) {
  cutOff ||= performance.now();
  const refused = code >= 4400;
  if (!session || refused || performance.now() - cutOff > COME_BACK) {
    status("cut off");
    if (!refused) notice("the connection to the server is lost", true);
    session = null;
    player.hold.end(); // what has come is all there will be
    return;
  }
  status("coming back");
  // What has not come is to be made again, and what the server may make again is not shown.
  const hold = Math.min(window.chameleon.shown + player.lead, received);
  player.hold.begin(hold, changes);
  const { paused } = player;
  const values = { person: chosen.person, garment: chosen.garment, resume: session, hold, paused };
  setTimeout(() => connect(values), 400);
}

// A chunk came: if it is the first of a change, it belongs to the time that the change took.
function note({ first_frame: first, frames, encoded_ms }) {
  received = first + frames;
  if (applied.has(first)) Object.assign(applied.get(first), { encoded_ms, came: performance.now() });
}

function shown(frame, now) {
  window.chameleon.shown = frame + 1;
  for (const [first, message] of applied) {
    if (first > frame) continue;
    applied.delete(first);
    seen(message, now);
  }
  shownAt.push(now);
  if (shownAt.length > 24) shownAt.shift();
  const seconds = (now - shownAt[0]) / 1000;
  if (shownAt.length > 8) at("shown").textContent = `${((shownAt.length - 1) / seconds).toFixed(1)} frames/s`;
  if (replayed && frame + 1 >= replayed.frames && !player.paused) {
    replayed = null;
    setPaused(true);
    notice("that was the replay; it can go on from here");
  }
}

// A change is on the screen.
function seen(message, now) {
  const wish = asked.get(message.id);
  if (!wish) return;
  for (const key of asked.keys()) if (key <= message.id) asked.delete(key);
  if (wish.garment) remember(wish.garment);
  if (wish.at !== undefined) return; // nobody has waited for it
  const taken = now - wish.clicked;
  window.chameleon.latencies.push(taken);
  window.chameleon.applied.push({ ...message, clicked: wish.clicked, shown: now });
  at("change").textContent = `${Math.round(taken)} ms`;
}

// The mechanisms of a manifest as a list of words; undefined where it leaves them to the model.
function words(found) {
  return found && ["refresh", ...OPTIONAL].filter((word) => found[word]);
}

// Tell the server all changes of a manifest, no faster than it listens, and let it begin.
async function plan(manifest) {
  for (const { frame, mechanisms: does, ...values } of manifest.changes.slice(1)) {
    changes += 1;
    if (changes % 50 === 0) await new Promise((done) => setTimeout(done, 700));
    asked.set(changes, { ...values, at: frame });
    if (does) values.mechanisms = words(does);
    stream.say("session.interaction", { id: changes, at: Math.max(1, frame), ...values });
  }
  stream.say("session.resume");
}

// Make a stream again from the JSON file that came with its film.
async function replay(file) {
  if (!file) return;
  try {
    const manifest = JSON.parse(await file.text());
    const [first] = manifest.changes;
    for (const [name, url] of Object.entries(manifest.pictures)) {
      const data = Uint8Array.from(atob(url.split(",")[1]), (one) => one.charCodeAt(0));
      const kind = name.split("_")[0];
      addTile({ ...await upload(kind, new Blob([data])), title: "of the replay" });
    }
    choose("person", first.person, false);
    choose("garment", first.garment, false);
    at("prompt").value = first.prompt ?? "";
    at("seed").value = manifest.seed;
    start(manifest);
  } catch (error) {
    notice(`this file is no manifest of a stream (${error.message})`, true);
  }
}

function setPaused(paused) {
  at("pause").setAttribute("aria-pressed", String(paused));
  at("pause").textContent = paused ? "Go on" : "Pause";
  if (player) player.paused = paused;
  if (session) stream.say(paused ? "session.pause" : "session.resume");
}

function remember(name) {
  const item = document.createElement("li");
  const image = document.createElement("img");
  image.src = pictures.get(name).thumbnail;
  image.alt = pictures.get(name).title;
  item.append(image);
  at("timeline").append(item);
}

async function download() {
  try {
    for (const [name, blob] of [
      ["chameleon.mp4", await recording(session)],
      ["chameleon.json", await manifest(session)],
    ]) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    }
  } catch (error) {
    notice(error.message, true);
  }
}

at("start").addEventListener("click", () => start());
at("download").addEventListener("click", download);
at("pause").addEventListener("click", () => {
  setPaused(at("pause").getAttribute("aria-pressed") !== "true");
});
at("manifest").addEventListener("change", () => {
  replay(at("manifest").files[0]);
  at("manifest").value = ""; // so that the same file can be chosen again
});
at("again").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") at("manifest").click();
});
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (session) change({ prompt: at("prompt").value });
});
setInterval(() => {
  if (session) stream.say("session.played", { frame: window.chameleon.shown });
}, 100);

try {
  const found = await ready(status);
  model = found.model;
  for (const word of OPTIONAL) {
    at(word).checked = found.mechanisms.includes(word);
    at(word).addEventListener("change", () => settle(word));
  }
  for (const picture of await wardrobe()) addTile(picture);
  Object.keys(tiles).forEach(addUpload);
  if (available()) addCamera();
  for (const kind of Object.keys(tiles)) {
    const first = tiles[kind].querySelector("button[data-name]");
    if (first) choose(kind, first.dataset.name);
  }
  status("ready");
} catch (error) {
  status("not ready");
  notice(error.message, true);
}
