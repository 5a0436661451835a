// The page: tiles, buttons, figures. What it knows of streams is in connection.js and player.js.

import { available, picture as fromCamera } from "./camera.js";
import { Stream, manifest, ready, recording, upload, wardrobe } from "./connection.js";
import { Player } from "./player.js";

const at = (id) => document.getElementById(id);
const tiles = { garment: at("garments"), person: at("people") };
const chosen = { garment: null, person: null };
const pictures = new Map(); // by name

let stream = null;
let player = null;
let session = null;
let changes = 0;
let asked = new Map(); // changes that were not seen yet: number -> {name, at}
let applied = new Map(); // first frame -> number of the change
const shownAt = []; // times of the last frames

// What tests and curious people may look at: milliseconds from a click to the changed frame.
window.chameleon = { latencies: [], shown: 0 };

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

function choose(kind, name) {
  chosen[kind] = name;
  for (const tile of tiles[kind].querySelectorAll("button[data-name]")) {
    tile.setAttribute("aria-selected", String(tile.dataset.name === name));
  }
  at("start").disabled = !(chosen.garment && chosen.person);
  if (stream && session) change({ [kind]: name });
}

function mechanisms() {
  return ["refresh", ...["withdraw", "disentangle"].filter((word) => at(word).checked)];
}

function change(values) {
  changes += 1;
  asked.set(changes, { ...values, at: performance.now() });
  at("change").textContent = "...";
  stream.say("session.interaction", { id: changes, mechanisms: mechanisms(), ...values });
}

function start() {
  stream?.close();
  player?.stop();
  session = null;
  changes = 0;
  asked = new Map();
  applied = new Map();
  at("timeline").replaceChildren();
  player = new Player(at("screen"), shown);
  remember(chosen.garment);
  stream = new Stream({
    person: chosen.person,
    garment: chosen.garment,
    prompt: at("prompt").value,
    seed: Number(at("seed").value) || 0,
    codec: at("codec").value,
    mechanisms: mechanisms(),
  }, heard);
  status("starting");
  notice("");
  at("start").textContent = "Start again";
}

async function heard(message, packets) {
  switch (message.type) {
    case "session.queued":
      notice(`others are before you: place ${message.position}`);
      break;
    case "session.ready":
      ({ session } = message);
      at("pause").disabled = at("download").disabled = false;
      status("live");
      notice("");
      break;
    case "video.start":
      try {
        await player.begin(message);
      } catch (error) {
        at("codec").value = "jpeg";
        notice("this browser has no decoder for H.264 here: going on with single pictures");
        start();
      }
      break;
    case "video.chunk":
      await player.add(message, packets);
      at("made").textContent = `${(1000 * message.frames / message.made_ms).toFixed(1)} frames/s`;
      break;
    case "session.flush":
      player.flush(message.from_frame);
      break;
    case "session.applied":
      applied.set(message.first_frame, message.id);
      break;
    case "session.error":
      notice(message.message, true);
      break;
    case "session.done":
    case "closed":
      status(message.code && message.code !== 1000 ? "cut off" : "ended");
      session = message.type === "closed" ? null : session;
      break;
  }
}

function shown(frame, now) {
  window.chameleon.shown = frame + 1;
  const number = applied.get(frame);
  if (number !== undefined) {
    applied.delete(frame);
    const wish = asked.get(number);
    const taken = now - wish.at;
    for (const key of asked.keys()) if (key <= number) asked.delete(key);
    window.chameleon.latencies.push(taken);
    at("change").textContent = `${Math.round(taken)} ms`;
    if (wish.garment) remember(wish.garment);
  }
  shownAt.push(now);
  if (shownAt.length > 24) shownAt.shift();
  const seconds = (now - shownAt[0]) / 1000;
  if (shownAt.length > 8) at("shown").textContent = `${((shownAt.length - 1) / seconds).toFixed(1)} frames/s`;
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

at("start").addEventListener("click", start);
at("download").addEventListener("click", download);
at("pause").addEventListener("click", () => {
  const paused = at("pause").getAttribute("aria-pressed") !== "true";
  at("pause").setAttribute("aria-pressed", String(paused));
  at("pause").textContent = paused ? "Go on" : "Pause";
  player.paused = paused;
  stream.say(paused ? "session.pause" : "session.resume");
});
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (stream && session) change({ prompt: at("prompt").value });
});
setInterval(() => {
  if (session) stream.say("session.played", { frame: window.chameleon.shown });
}, 100);

try {
  await ready(status);
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
