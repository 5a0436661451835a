// The server: pictures over HTTP, one stream over a WebSocket.

const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";

function authorized(options = {}) {
  return { ...options, headers: { ...options.headers, Authorization: `Bearer ${token}` } };
}

async function asked(path, options) {
  const answer = await fetch(path, authorized(options));
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

export const wardrobe = async () => (await asked("api/wardrobe")).json();

export async function upload(kind, file) {
  return (await asked(`api/pictures/${kind}`, { method: "PUT", body: file })).json();
}

export const recording = async (session) =>
  (await asked(`api/streams/${session}/recording.mp4`)).blob();

export const manifest = async (session) =>
  (await asked(`api/streams/${session}/manifest.json`)).blob();

// Waits until the model is compiled.
export async function ready(tell) {
  for (;;) {
    const answer = await fetch("readyz").catch(() => null);
    if (answer?.ok) return answer.json();
    if (answer?.status === 500) throw new Error((await answer.json()).message);
    tell(answer ? "compiling the model" : "waiting for the server");
    await new Promise((done) => setTimeout(done, 500));
  }
}

// Packets of a binary message: how many, the length of each, then all of them; little endian.
function unpacked(buffer) {
  const view = new DataView(buffer);
  const count = view.getUint32(0, true);
  const packets = [];
  let start = 4 + 4 * count;
  for (let i = 0; i < count; i++) {
    const length = view.getUint32(4 + 4 * i, true);
    packets.push(new Uint8Array(buffer, start, length));
    start += length;
  }
  return packets;
}

// One stream. `on(message, packets)` gets every message, and is waited for before the next one;
// packets come with `video.chunk`.
export class Stream {
  constructor(start, on) {
    this.socket = new WebSocket(new URL("api/stream", location.href.replace(/^http/, "ws")));
    this.socket.binaryType = "arraybuffer";
    this.line = Promise.resolve();
    const hand = (...message) => {
      this.line = this.line.then(() => (this.closed ? null : on(...message))).catch(console.error);
    };
    let chunk = null;
    this.socket.onopen = () => this.say("session.start", { version: 1, token, ...start });
    this.socket.onmessage = ({ data }) => {
      if (typeof data !== "string") {
        hand(chunk, unpacked(data));
        return;
      }
      const message = JSON.parse(data);
      if (message.type === "video.chunk") chunk = message;
      else hand(message);
    };
    this.socket.onclose = ({ code }) => hand({ type: "closed", code });
  }

  say(type, values = {}) {
    if (this.socket.readyState === WebSocket.OPEN) {
      this.socket.send(JSON.stringify({ type, ...values }));
    }
  }

  // End the stream; nothing more is heard of it.
  close() {
    this.say("session.stop");
    this.closed = true;
    setTimeout(() => this.socket.close(), 500);
  }
}
